"""Super-resolve photographs: compare PCSR with its original network, or enlarge pictures."""

from engine.demo.cli import main
from engine.demo.words import make_parser
from utils.cli import run

if __name__ == "__main__":
    run(lambda: main(make_parser()))
