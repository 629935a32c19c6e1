"""Steps of the Dockerfile as tests/image.py reads them; `make test-image` runs them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from image import DOCKERFILE, Stage, build, instructions


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A folder with a wheel in dist/."""
    (tmp_path / "context" / "dist").mkdir(parents=True)
    (tmp_path / "context" / "dist" / "twotower-1-py3-none-any.whl").write_text("wheel", encoding="utf-8")
    return tmp_path / "context"


class Built:
    """What a build has done: the images of its stages, and the commands that it has run, with the user of each."""

    def __init__(self, folder: Path, context: Path) -> None:
        self.folder, self.context = folder, context
        self.images: list[str] = []
        self.commands: list[tuple[str, str]] = []

    def root(self, image: str) -> Path:
        self.images.append(image)
        made = self.folder / f"root{len(self.images)}"
        (made / "opt").mkdir(parents=True)
        return made

    def run(self, at: Stage, command: str) -> None:
        self.commands.append((at.user, command))
        (at.root / "opt" / "twotower").mkdir(exist_ok=True)
        (at.root / "opt" / "twotower" / "made").write_text(command, encoding="utf-8")

    def build(self, text: str) -> Stage:
        return build(text, self.root, self.context, self.run)


def test_every_step_of_the_dockerfile_is_run_and_its_container_is_as_it_says(tmp_path: Path, context: Path) -> None:
    text, built = DOCKERFILE.read_text(encoding="utf-8"), Built(tmp_path, context)
    stage = built.build(text)
    words = [word for word, _ in instructions(text)]
    assert len(built.images) == words.count("FROM") == 2
    assert [command for _, command in built.commands] == [rest for word, rest in instructions(text) if word == "RUN"]
    assert {user for user, _ in built.commands} == {"0"}, "steps that install stand before USER"
    assert (tmp_path / "root1/build/twotower-1-py3-none-any.whl").read_text() == "wheel"
    assert (stage.root / "opt/twotower/made").read_text() == built.commands[0][1], "COPY --from took the other stage's"
    assert not (stage.root / "build").exists()
    assert (stage.user, stage.folder, stage.stop) == ("10001", "/tmp", signal.SIGTERM)
    assert stage.env["PYTHONUNBUFFERED"] == "1"
    assert stage.health[0] == "/opt/twotower/bin/python"
    assert "/livez" in stage.health[-1]
    assert stage.entrypoint[:2] == ("/opt/twotower/bin/twotower", "serve")
    assert stage.command[:2] == ("--keys", "/keys.toml")
