"""Small single-purpose modules that models, datasets, engine and scripts share."""
