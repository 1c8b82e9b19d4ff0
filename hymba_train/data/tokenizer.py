"""One face for Hugging Face ``tokenizer.json`` and SentencePiece ``.model`` files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from hymba_train.data.tokenizer_backends import Backend, GigaToken, HuggingFace, SentencePiece
from hymba_train.errors import UserError

EOD_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|startoftext|>")
BACKENDS = ("default", "gigatoken")
"""``default``: the library the file was made for."""

SAMPLE_TEXTS = (
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n\n", "\t", "\r\n", "\x00", "\x7f", "\ufeff",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want of a "
    "wife.\n\nHowever little known the feelings or views of such a man may be on his first entering a neighbourhood",
    "def f(x: int) -> int:\n    if x > 10:\n\treturn x ** 2  # square\n        \n    return -x\n",
    "3.14159 0x1F 1,000,000 1e-5 2024-11-23 12:30:59", "</s> <s> <unk> [PAD] <|endoftext|> <0x0A> \u2581x",
    "caf\u00e9 cafe\u0301 \u00a0\u3000\u200b na\u00efve \u0130stanbul \ufb01 \u212b",
    "\u4e2d\u6587\u6587\u672c \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2603\ufe0f \U0001d54f", "x" * 300, " " * 300 + "deep",
    "don't WON'T I'll they've O'Neil's 'quoted' \u2018curly\u2019", "https://example.org/a_b?c=d&e=%20#frag",
    "<div class=\"x\">a&nbsp;b</div>\n\n\n<p>c</p>", "$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$",
)  # fmt: skip
"""What a second backend must encode as the first does before it is used at all."""


class Tokenizer:
    """Text to token ids and back. Made by :meth:`load`.

    Attributes:
        path: the file that defines the tokenizer.
        vocab_size: largest id + 1, special tokens included.
        eod_id: id that ends a document (first of ``</s>``, ``<|endoftext|>``, ``<|end_of_text|>`` that exists).
        bos_id: id that begins a text, or None when the tokenizer has none.
        content_hash: sha256 (hex) of the defining file.
    """

    def __init__(self, path: Path, content: bytes, backend: Backend, fast: GigaToken | None = None) -> None:
        self.path = path
        self.content_hash = hashlib.sha256(content).hexdigest()
        self._backend = backend
        self._fast = fast
        self.vocab_size = backend.vocab_size
        eod_id = next((i for name in EOD_NAMES if (i := backend.find(name)) is not None), None)
        if eod_id is None:
            raise UserError(f"{path} has no end-of-document token: none of {', '.join(EOD_NAMES)} is in its vocabulary")
        self.eod_id: int = eod_id
        self.bos_id: int | None = next((i for name in BOS_NAMES if (i := backend.find(name)) is not None), None)

    @classmethod
    def load(cls, path: str | Path, backend: str = "default") -> Tokenizer:
        """Load a directory with tokenizer.json or tokenizer.model (the first wins), or one such file.

        Args:
            backend: ``gigatoken`` encodes batches with that library, several times faster, after it has encoded
                SAMPLE_TEXTS to the same ids; ``default`` with the library of the file.

        Raises UserError: nothing there, not a tokenizer, no end-of-document token, or a backend whose ids differ.
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
        is_sentencepiece = file.suffix == ".model"
        try:
            default = SentencePiece(content) if is_sentencepiece else HuggingFace(content)
        except Exception as error:  # both libraries raise bare Exception or RuntimeError
            raise UserError(f"{file} cannot be read as a tokenizer: {_first_line(error)}") from error
        if backend == "default":
            return cls(file, content, default)
        if backend != "gigatoken":
            raise UserError(f"no tokenizer backend {backend}: there are {', '.join(BACKENDS)}")
        try:
            fast = GigaToken(content, is_sentencepiece)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{file}: gigatoken cannot read this tokenizer ({_first_line(error)}): use the backend default"
            ) from error
        tokenizer = cls(file, content, default, fast)
        tokenizer.compare_backends(SAMPLE_TEXTS)
        return tokenizer

    @property
    def backend(self) -> str:
        """Library that encodes batches."""
        return self._fast.name if self._fast else self._backend.name

    @property
    def is_fast(self) -> bool:
        """True: batches are encoded by another library than the file's own."""
        return self._fast is not None

    def encode(self, text: str, *, add_bos: bool = False, add_eod: bool = False) -> list[int]:
        """Token ids of ``text``; names of special tokens inside it are plain text. "" gives []."""
        return self.encode_batch([text], add_bos=add_bos, add_eod=add_eod)[0]

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool = False, add_eod: bool = False) -> list[list[int]]:
        """Ids of several texts, each as :meth:`encode` gives them. Raises UserError: no token to begin with."""
        if add_bos and self.bos_id is None:
            raise UserError(f"{self.path} has no token that begins a text ({', '.join(BOS_NAMES)})")
        head = [self.bos_id] if add_bos and self.bos_id is not None else []
        tail = [self.eod_id] if add_eod else []
        encoded = self._backend.encode(texts)
        return [head + ids + tail for ids in encoded] if add_bos or add_eod else encoded

    def encode_documents(
        self, texts: Sequence[str], dtype: np.dtype, append_eod: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Documents for a .bin file: (tokens of all end to end, tokens of each int32). Texts without a token are left
        out; the others end with ``eod_id`` if ``append_eod``. This is what the chosen backend makes fast."""
        if self._fast:
            flat, lengths = self._fast.encode_flat(texts)
        else:
            encoded = self._backend.encode(texts)
            lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
            flat = np.fromiter(chain.from_iterable(encoded), dtype, int(lengths.sum()))
        lengths = lengths[lengths > 0]
        if not append_eod:
            return flat.astype(dtype, copy=False), lengths.astype(np.int32)
        tokens = np.full(flat.size + lengths.size, self.eod_id, dtype)
        begin = 0
        for document, end in enumerate(np.cumsum(lengths).tolist()):  # a copy a document: faster than np.insert
            tokens[begin + document : end + document] = flat[begin:end]
            begin = end
        return tokens, (lengths + 1).astype(np.int32)

    def compare_backends(self, texts: Sequence[str]) -> None:
        """Encode ``texts`` with the chosen backend and with the file's own library. Raises UserError if ids differ."""
        if not self._fast or not texts:
            return
        flat, lengths = self._fast.encode_flat(texts)
        found = [ids.tolist() for ids in np.split(flat, np.cumsum(lengths)[:-1])]
        for text, expected, ids in zip(texts, self._backend.encode(texts), found, strict=True):
            if ids != expected:
                place = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
                raise UserError(
                    f"{self.path}: {self._fast.name} and {self._backend.name} differ from token {place} of the text "
                    f"{text[:60]!r} on ({ids[place : place + 3]}, not {expected[place : place + 3]}): use the backend "
                    "default"
                )

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids. ``skip_special=False`` writes special tokens by name."""
        return self._backend.decode([int(i) for i in ids], skip_special)

    def piece(self, token_id: int) -> str:
        """The vocabulary's string for one id; '' for an id below vocab_size that it skips."""
        return self._backend.piece(int(token_id))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
