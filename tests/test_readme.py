"""What the README prints works: its commands' words, its configs, its example backbone."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from models.pcsr import PCSR
from utils.config import check_config, parse_yaml
from utils.launch import OWN_WORDS, TORCHRUN_WORDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command that runs a script, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w and w[0] in ("python", "./dist.sh")]


def program_of(words: list[str]) -> tuple[str, ...]:
    """What a command runs: a script; or a module, and its sub-command where it has one."""
    if words[1] != "-m":
        return (words[1],)
    return tuple(itertools.takewhile(lambda word: word == "-m" or word[0] != "-", words[1:]))


PROGRAMS = sorted({program_of(words) for words in commands()})


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_commands_use_words_that_exist(program: tuple[str, ...]) -> None:
    run = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    shown = run.stdout
    launcher = {f"--{word}" for word in (*OWN_WORDS, *TORCHRUN_WORDS)}
    for words in commands():
        if program_of(words) != program:
            continue
        for word in words[1 + len(program) :]:
            if word.startswith("--") and not (words[0] == "./dist.sh" and word in launcher):
                assert re.search(rf"{word}\b", shown), f"{program} has no {word}"
            if word.startswith("configs/"):
                assert (ROOT / word).is_file(), word


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)`|^make ([a-z-]+) ", README, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_example_with_three_upsamplers_builds() -> None:
    (text,) = blocks("yaml")
    config = check_config(parse_yaml(text, "README"), "readme")
    model = models.make(config.model)
    assert isinstance(model, PCSR)
    assert len(model.upsamplers) == 3


def test_example_backbone_works() -> None:
    (source,) = blocks("python")
    try:
        exec(compile(source, "README", "exec"), {})
        original = models.make({"name": "plain", "args": {"nf": 4, "depth": 2}})
        assert original(torch.rand(1, 3, 5, 6)).shape == (1, 3, 20, 24)
        encoder = {"name": "plain", "args": {"nf": 4, "no_upsampling": True}}
        mlp = {"name": "mlp", "args": {"hidden_list": [4]}}
        sampler = {"name": "liif-sampler", "args": {"imnet_spec": mlp}}
        args = {"encoder_spec": encoder, "heavy_sampler_spec": sampler}
        pcsr = models.make({"name": "pcsr-phase0", "args": args})
        assert pcsr(torch.rand(1, 3, 5, 6), (11, 13)).shape == (1, 3, 11, 13)
    finally:
        models.MODELS._builders.pop("plain", None)
