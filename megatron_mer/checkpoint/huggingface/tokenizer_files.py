"""The files of a tokenizer in a Hugging Face folder: found there, and put there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_mer.data.tokenizers.tokenizer_json import tokenizer_json
from megatron_mer.errors import DataError

_MAIN = {
    "sentencepiece": "tokenizer.model",
    "hf": "tokenizer.json",
    "tiktoken": "tokenizer.model",
}
"""Kind of tokenizer -> what Hugging Face calls its file. A `tokenizer.json` beside a SentencePiece
model was made from it."""

_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer.model",
)
ALL = tuple(dict.fromkeys((*_MAIN.values(), *_BESIDE)))


def own_tokenizer(folder: Path, like: str | None = None) -> Tokenizer | None:
    """The tokenizer that lies in a folder; None where there is none.

    Args:
        folder: of a checkpoint.
        like: `kind:place#more`: that kind is tried first, with what it says behind the `#`.

    Raises:
        DataError: there is one, and it cannot be read.
    """
    first, _, place = (like or "").partition(":")
    more = f"#{place.partition('#')[2]}" if "#" in place else ""
    failures: list[DataError] = []
    for kind in sorted(_MAIN, key=lambda one: one != first):
        if not (folder / _MAIN[kind]).is_file():
            continue
        for suffix in dict.fromkeys((more if kind == first else "", "")):
            try:
                return load_tokenizer(f"{kind}:{folder / _MAIN[kind]}{suffix}")
            except DataError as error:
                failures.append(error)
    if failures:
        raise failures[0]
    return None


@dataclass(frozen=True)
class TokenizerFiles:
    """What goes into a folder so that it has a tokenizer."""

    copied: Mapping[str, Path]
    """Name there -> file that is copied."""
    made: Mapping[str, str]
    """Name there -> text."""

    @classmethod
    def of(cls, spec: str) -> TokenizerFiles:
        """The files of a tokenizer by its name, and those beside it that belong to it.

        Args:
            spec: `kind:place`, as in a configuration.

        Raises:
            ConfigError, DataError: there is no such tokenizer.
        """
        tokenizer = load_tokenizer(spec)
        kind, _, place = spec.partition(":")
        path = Path(place.partition("#")[0])
        if path.is_dir():
            path = path / _MAIN[kind]
        copied = {_MAIN[kind]: path}
        # A lone model in a folder of other things has nothing that belongs to it beside it.
        if path.name == _MAIN[kind]:
            others = (name for name in _BESIDE if (path.parent / name).is_file())
            copied.update({name: path.parent / name for name in others})
        made = {}
        if "tokenizer.json" not in copied and (text := tokenizer_json(tokenizer)):
            made["tokenizer.json"] = text
        if "tokenizer_config.json" not in copied:
            made["tokenizer_config.json"] = json.dumps(_settings(tokenizer), indent=2) + "\n"
        return cls(copied, made)

    @classmethod
    def inside(cls, folder: Path) -> TokenizerFiles:
        """Those that lie in a folder already."""
        found = (name for name in ALL if (folder / name).is_file())
        return cls({name: folder / name for name in found}, {})

    def write(self, folder: Path) -> Iterator[Path]:
        """Put them there; gives each file once it is there."""
        for name, source in self.copied.items():
            shutil.copyfile(source, folder / name)
            yield folder / name
        for name, text in self.made.items():
            (folder / name).write_text(text, encoding="utf-8")
            yield folder / name


def _settings(tokenizer: Tokenizer) -> dict[str, object]:
    """A tokenizer_config.json for a tokenizer that has none."""
    end = tokenizer.piece(tokenizer.eod_id)
    # Known to all versions: what is read is tokenizer.json, as it stands.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end and end.name}
    special = tokenizer.special_pieces() if isinstance(tokenizer, SentencePieceTokenizer) else {}
    return {**settings, **special}
