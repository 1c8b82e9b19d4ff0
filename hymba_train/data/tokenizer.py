"""One face for Hugging Face ``tokenizer.json`` and SentencePiece ``.model`` files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hymba_train.errors import UserError

EOD_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>")


class _Backend(Protocol):
    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def piece(self, token_id: int) -> str: ...
    def find(self, piece: str) -> int | None: ...


class _HuggingFace:
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
        return self._fast.id_to_token(token_id)

    def find(self, piece: str) -> int | None:
        return self._fast.token_to_id(piece)


class _SentencePiece:
    def __init__(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._processor.vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        if skip_special:  # SentencePiece never shows control pieces, but writes <unk> as " ⁇ "
            ids = [i for i in ids if not self._processor.is_unknown(i)]
            return self._processor.decode(ids)
        text, run = "", []
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


class Tokenizer:
    """Text to token ids and back. Made by :meth:`load`.

    Attributes:
        path: the file that defines the tokenizer.
        vocab_size: largest id + 1, special tokens included.
        eod_id: id that ends a document (first of ``</s>``, ``<|endoftext|>``, ``<|end_of_text|>`` that exists).
        bos_id: id that begins a text, or None when the tokenizer has none.
        content_hash: sha256 (hex) of the defining file.
    """

    def __init__(self, path: Path, content: bytes, backend: _Backend) -> None:
        self.path = path
        self.content_hash = hashlib.sha256(content).hexdigest()
        self._backend = backend
        self.vocab_size = backend.vocab_size
        eod_id = next((i for name in EOD_NAMES if (i := backend.find(name)) is not None), None)
        if eod_id is None:
            raise UserError(f"{path} has no end-of-document token: none of {', '.join(EOD_NAMES)} is in its vocabulary")
        self.eod_id: int = eod_id
        self.bos_id: int | None = next((i for name in BOS_NAMES if (i := backend.find(name)) is not None), None)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a directory with tokenizer.json or tokenizer.model (the first wins), or one such file.

        Raises UserError: nothing there, not a tokenizer, or no end-of-document token.
        """
        given = Path(path)
        file = given
        if given.is_dir():
            names = [given / "tokenizer.json", given / "tokenizer.model"]
            file = next((name for name in names if name.is_file()), given)
        if not file.is_file():
            raise UserError(
                f"no tokenizer at {given}: give a directory with tokenizer.json or tokenizer.model, or a .model file "
                "(`hymba data train-tokenizer` makes one)"
            )
        content = file.read_bytes()
        try:
            backend = _SentencePiece(content) if file.suffix == ".model" else _HuggingFace(content)
        except Exception as error:  # both libraries raise bare Exception or RuntimeError
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} cannot be read as a tokenizer: {first_line}") from error
        return cls(file, content, backend)

    def encode(self, text: str, *, add_bos: bool = False, add_eod: bool = False) -> list[int]:
        """Token ids of ``text``; names of special tokens inside it are plain text. "" gives []."""
        return self.encode_batch([text], add_bos=add_bos, add_eod=add_eod)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_bos: bool = False, add_eod: bool = False
    ) -> list[list[int]]:
        """Ids of several texts, each as :meth:`encode` gives them."""
        if add_bos and self.bos_id is None:
            raise UserError(f"{self.path} has no token that begins a text ({', '.join(BOS_NAMES)})")
        head = [self.bos_id] if add_bos else []
        tail = [self.eod_id] if add_eod else []
        encoded = self._backend.encode(texts)
        return [head + ids + tail for ids in encoded] if add_bos or add_eod else encoded

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids. ``skip_special=False`` writes special tokens by name."""
        return self._backend.decode([int(i) for i in ids], skip_special)

    def piece(self, token_id: int) -> str:
        """The vocabulary's string for one id."""
        return self._backend.piece(int(token_id))
