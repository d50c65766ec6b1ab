"""The training loop and the evaluation loop that the scripts share."""
