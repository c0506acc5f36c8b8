"""SentencePiece and tiktoken vocabularies as the `tokenizer.json` that transformers reads.

transformers would otherwise guess from the model's file, and takes any SentencePiece model for BPE.
In text, `<s>` is three signs for us and the token for transformers, as always there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from megatron_mer.data.tokenizers.base import Tokenizer
from megatron_mer.data.tokenizers.huggingface import BYTE_LETTERS
from megatron_mer.data.tokenizers.sentencepiece import SPACE, SentencePieceTokenizer
from megatron_mer.data.tokenizers.tiktoken import TiktokenTokenizer

if TYPE_CHECKING:
    import tokenizers

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
_POSSESSIVE: Final = re.compile(r"(?<=[+*?])\+|(?<=\d})\+")


def tokenizer_json(tokenizer: Tokenizer) -> str | None:
    """Write a vocabulary in the form of the `tokenizers` library.

    Unigram scores are compared in double precision there and in single precision by SentencePiece:
    of two splits that are equally likely either may be taken, about once in a million characters.

    Returns:
        The file's content; None for a kind that the library does not have: SentencePiece's word
        and character models, and spaces at the ends of pieces.
    """
    made: tokenizers.Tokenizer | None = None
    if isinstance(tokenizer, SentencePieceTokenizer):
        made = _of_sentencepiece(tokenizer)
    elif isinstance(tokenizer, TiktokenTokenizer):
        made = _of_tiktoken(tokenizer)
    return None if made is None else str(made.to_str(pretty=True))


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer | None:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, models

    model: Any = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.path.read_bytes())
    trained, pieces = model.trainer_spec, model.pieces
    if trained.model_type not in (_UNIGRAM, _BPE) or trained.treat_whitespace_as_suffix:
        return None
    scores = [(piece.piece, piece.score) for piece in pieces]
    if trained.model_type == _UNIGRAM:
        kind: Any = models.Unigram(scores, trained.unk_id, byte_fallback=trained.byte_fallback)
    else:
        kind = models.BPE(
            {piece: number for number, (piece, _) in enumerate(scores)},
            _merges_of_scores({one.piece: one.score for one in pieces if one.type == _NORMAL}),
            unk_token=pieces[trained.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    made = Tokenizer(kind)
    made.normalizer = _normalizer(model.normalizer_spec)
    made.decoder = _decoder(model.normalizer_spec.add_dummy_prefix)
    for piece in pieces:
        if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = piece.type != _USER_DEFINED
            made.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    return made


def _merges_of_scores(scores: dict[str, float]) -> list[tuple[str, str]]:
    """SentencePiece's BPE joins the pair whose piece has the best score, in either order of pairs.

    Pairs that make the same piece are ordered by their own places in the vocabulary.
    """
    place = {piece: number for number, piece in enumerate(scores)}
    found = [
        (-score, place[piece[:cut]], place[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in place and piece[cut:] in place
    ]
    return [pair for *_, pair in sorted(found)]


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$|(?<= ) +"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(adds_space: bool) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _of_tiktoken(tokenizer: TiktokenTokenizer) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = tokenizer.scheme.special_tokens
    vocabulary = {**{_letters(piece): rank for piece, rank in tokenizer.ranks.items()}, **special}
    merges = [
        (_letters(left), _letters(right)) for left, right in _merges_of_ranks(tokenizer.ranks)
    ]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    # Onigmo reads {1,3}+ as repeated; without that + these patterns only take longer.
    pattern = _POSSESSIVE.sub("", tokenizer.scheme.pattern)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return made


def _letters(piece: bytes) -> str:
    return "".join(BYTE_LETTERS[byte] for byte in piece)


def _merges_of_ranks(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Each token is made of the two parts that remain when only lower ranks are joined."""
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [piece[place : place + 1] for place in range(len(piece))]
        while len(parts) > 2:
            places = range(len(parts) - 1)
            best = min(places, key=lambda at: ranks.get(parts[at] + parts[at + 1], rank))
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
