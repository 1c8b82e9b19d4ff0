"""Libraries that encode text, behind one face. The ids are those of the tokenizer's file, whichever library encodes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hymba_train.data.extras import import_extra


class Backend(Protocol):
    """``name`` is the library's. Names of special tokens inside a text are plain text to every backend."""

    name: str
    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def piece(self, token_id: int) -> str: ...
    def find(self, piece: str) -> int | None: ...


class HuggingFace:
    """``tokenizers`` on a tokenizer.json."""

    name = "tokenizers"

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer as Fast

        self._fast = Fast.from_str(content.decode())
        # "</s>" in a text is four characters, not the end of a document.
        self._fast.encode_special_tokens = True
        self._fast.no_padding()
        self._fast.no_truncation()
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special)

    def piece(self, token_id: int) -> str:
        return self._fast.id_to_token(token_id) or ""  # tokenizer.json may skip ids

    def find(self, piece: str) -> int | None:
        return self._fast.token_to_id(piece)


class SentencePiece:
    """``sentencepiece`` on a .model file."""

    name = "sentencepiece"

    def __init__(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._processor.vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Text of ``ids``; without ``skip_special`` special pieces show their names, which SentencePiece would hide."""
        if skip_special:  # SentencePiece never shows control pieces, but writes <unk> as " ⁇ "
            ids = [i for i in ids if not self._processor.is_unknown(i)]
            return self._processor.decode(ids)
        text = ""
        run: list[int] = []
        for i in ids:
            if self._processor.is_control(i) or self._processor.is_unknown(i):
                text += self._processor.decode(run) + self.piece(i)
                run = []
            else:
                run.append(i)
        return text + self._processor.decode(run)

    def piece(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id)

    def find(self, piece: str) -> int | None:
        token_id = self._processor.piece_to_id(piece)
        return token_id if self._processor.id_to_piece(token_id) == piece else None


class GigaToken:
    """``gigatoken`` for encoding only. Whether its ids are the same is for the caller to prove.

    It must be told not to see special tokens in a text, and it knows no Split pre-tokenizer in a byte-fallback model;
    the one that :mod:`hymba_train.data.convert_tokenizer` writes only makes ``tokenizers`` faster, and is taken away.
    """

    name = "gigatoken"

    def __init__(self, content: bytes, is_sentencepiece: bool) -> None:
        gigatoken = import_extra("gigatoken", "the tokenizer backend gigatoken")
        if is_sentencepiece:
            from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

            plain = json.loads(sentencepiece_to_tokenizer_json(content))
        else:
            plain = json.loads(content)
        plain["added_tokens"] = [token for token in plain.get("added_tokens", []) if not token.get("special")]
        plain["truncation"] = plain["padding"] = None
        if plain["model"].get("byte_fallback") and (plain.get("pre_tokenizer") or {}).get("type") == "Split":
            plain["pre_tokenizer"] = None
        self._fast = gigatoken.Tokenizer.from_json(json.dumps(plain))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts end to end uint32, ids of each text int64 [texts])."""
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)
