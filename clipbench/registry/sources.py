"""Source strings: where a backbone comes from, in one line of text.

    timm:NAME[.TAG]         an image model of timm; no tag: the architecture with random weights
    openclip:ARCH[/TAG]     a two-tower model of open_clip; no tag: random weights
    openclip:local-dir:DIR  one in a folder as open_clip reads it: `open_clip_config.json` and weights, else random ones
    hf:REPO[@REVISION]      a vision model of transformers: `owner/name` on the Hub; or a folder (`./…`, `/…`, `~…`)
    ckpt:PATH[@SOURCE]      own weights, on the architecture of another source (`ckpt:my.pt@timm:vit_base_patch16_224`)
    python:MODULE:FACTORY   own code: `FACTORY()` of an importable module returns the backbone

Only the syntax is checked here, without importing any of these libraries. Whether the model exists is for
`clipbench.backbones.check_source` to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clipbench.errors import UnknownNameError, UsageError

SourceKind = Literal["timm", "openclip", "hf", "ckpt", "python"]
WeightsKind = Literal["pretrained", "checkpoint", "random", "own code"]

# What each kind looks like, for error messages and for `--help`.
SYNTAX: dict[str, str] = {
    "timm": "timm:NAME or timm:NAME.TAG, as in timm:vit_base_patch14_dinov2.lvd142m",
    "openclip": "openclip:ARCH, openclip:ARCH/TAG or openclip:local-dir:FOLDER, as in "
    "openclip:ViT-B-16/laion2b_s34b_b88k",
    "hf": "hf:OWNER/NAME or hf:FOLDER, as in hf:facebook/dinov2-base",
    "ckpt": "ckpt:PATH or ckpt:PATH@SOURCE, as in ckpt:runs/last.safetensors@timm:vit_base_patch16_224",
    "python": "python:MODULE:FACTORY, as in python:my_models.vit:build",
}

_PATTERNS = {
    "timm": re.compile(r"(?P<name>\w+)(\.(?P<tag>\w+))?", re.ASCII),
    "openclip": re.compile(r"(?P<name>local-dir:[^\n]+|[\w.-]+)(/(?P<tag>[\w.-]+))?", re.ASCII),
    # A folder has no revisions, and may have "@" in its name.
    "hf": re.compile(r"(?P<name>[./~][^\n]*|[\w-][\w.-]*(/[\w.-]+)?)(@(?P<tag>[\w./-]+))?", re.ASCII),
    "python": re.compile(r"(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<tag>[^\W\d]\w*)"),
}
# open_clip's own prefix for a folder with a configuration and, perhaps, weights.
LOCAL_DIR = "local-dir:"
# The names that open_clip looks for in such a folder, best first; then any other of these kinds.
_LOCAL_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
_LOCAL_SUFFIXES = (".safetensors", ".bin", ".pth")
# The architecture behind a checkpoint starts at the last "@" that a source prefix follows; a path may hold other "@".
_ARCHITECTURE = re.compile(r"@(?=(timm|openclip|hf|python):)")


@dataclass(frozen=True)
class Source:
    """A source string, taken apart.

    Attributes:
        kind: The prefix.
        name: timm or open_clip architecture (or `local-dir:` and a folder), Hub repository or folder, checkpoint path,
            Python module.
        tag: timm or open_clip weights tag, Hub revision, Python factory; None where there is none.
        architecture: For `ckpt`: the source whose architecture the weights belong to, None when the file itself says.
    """

    kind: SourceKind
    name: str
    tag: str | None = None
    architecture: Source | None = None

    def __str__(self) -> str:
        if self.kind == "ckpt":
            return f"ckpt:{self.name}" + (f"@{self.architecture}" if self.architecture else "")
        separator = {"timm": ".", "openclip": "/", "hf": "@", "python": ":"}[self.kind]
        return f"{self.kind}:{self.name}" + (f"{separator}{self.tag}" if self.tag else "")

    @property
    def folder(self) -> str | None:
        """The local folder that it names where others of its kind name a repository or an architecture."""
        if self.kind == "openclip" and self.name.startswith(LOCAL_DIR):
            return self.name.removeprefix(LOCAL_DIR)
        return self.name if self.kind == "hf" and self.name[0] in "./~" else None

    def with_folder(self, path: str) -> Source:
        """The same with another path to its folder."""
        if self.kind == "openclip":
            return replace(self, name=LOCAL_DIR + path)
        return replace(self, name=path if path[0] in "./" else f"./{path}")

    @property
    def weights(self) -> WeightsKind:
        """What kind of weights this source alone stands for (a `checkpoint:` of the entry takes their place)."""
        if self.kind == "ckpt":
            return "checkpoint"
        if self.kind == "python":
            return "own code"
        if self.kind == "openclip" and self.folder is not None:
            return "checkpoint" if local_weights(Path(self.folder)) else "random"
        return "random" if self.kind in ("timm", "openclip") and self.tag is None else "pretrained"


def parse_source(text: str) -> Source:
    """Take a source string apart.

    Raises:
        UnknownNameError: The prefix is none of the five; the nearest are given.
        UsageError: The rest does not fit the prefix, or there is no prefix at all.
    """
    prefix, colon, rest = text.partition(":")
    if not colon:
        known = ", ".join(f"{kind}:" for kind in SYNTAX)
        raise UsageError(f"source '{text}' has no prefix", f"A source starts with one of {known} as in timm:{text}")
    if prefix not in SYNTAX:
        raise UnknownNameError("source prefix", prefix, SYNTAX)
    if prefix == "ckpt":
        return _parse_checkpoint(text, rest)
    match = _PATTERNS[prefix].fullmatch(rest)
    if match is None:
        raise _malformed(text, prefix)
    return Source(prefix, match["name"], match["tag"])  # type: ignore[arg-type]


def local_weights(folder: Path) -> list[Path]:
    """The files with weights in a folder of open_clip's, the one that open_clip takes first.

    Where none has a name that open_clip looks for, several cannot be told apart; the order is then the alphabet's.
    """
    found = sorted(p for p in folder.glob("*") if p.suffix in _LOCAL_SUFFIXES and p.is_file())
    known = [folder / name for name in _LOCAL_WEIGHTS if folder / name in found]
    return known[:1] or found


def expand_home(path: Path) -> Path:
    """`~` and `~user` written out.

    Raises:
        UsageError: There is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"'{path}' starts from the home of a user that does not exist", "Write the path out."
        ) from error


def _parse_checkpoint(text: str, rest: str) -> Source:
    starts = [match.start() for match in _ARCHITECTURE.finditer(rest)]
    if not starts:
        if not rest.strip():
            raise _malformed(text, "ckpt")
        return Source("ckpt", rest)
    path, architecture = rest[: starts[-1]], rest[starts[-1] + 1 :]
    if not path.strip():
        raise _malformed(text, "ckpt")
    return Source("ckpt", path, architecture=parse_source(architecture))


def _malformed(text: str, prefix: str) -> UsageError:
    return UsageError(f"source '{text}' is malformed", f"Expected {SYNTAX[prefix]}.")
