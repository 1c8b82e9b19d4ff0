"""`hymba data chat`: conversations and preference pairs to tokenised sources with a loss mask.

A conversation becomes one document: the text of the chat template, tokenised whole as at inference, and the
end-of-document token. Loss is on the answers: every token from behind the turn's header to its closing newline, and on
the end of the document. A pair becomes two documents, chosen and rejected, one behind the other.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.conversations import Conversation, conversation_of, pair_of
from data_prep.records import Chunk, TokenizedChunk, parse_object
from hymba_train.data.chat_template import TEMPLATE_SHA256, render
from hymba_train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatSettings:
    """How conversations become documents.

    Attributes:
        pairs: records are preference pairs.
        seq_length: S of the sequences that they are meant for: a conversation, or both sides of a pair together, may
            have S + 1 tokens (the last is only a label).
        too_long: what happens to longer ones: ``leave_out``, or ``cut`` (conversations alone): their end is lost.
    """

    pairs: bool
    seq_length: int
    too_long: str = "leave_out"

    def facts(self) -> dict[str, Any]:
        """For the manifest: what decides the output beside input and tokenizer."""
        kind = "pairs" if self.pairs else "conversations"
        return {
            "kind": kind, "template": TEMPLATE_SHA256, "seq_length": self.seq_length, "too_long": self.too_long,
        }  # fmt: skip


class ConversationEncoder:
    """What a process does with the records of a chunk."""

    def __init__(self, settings: ChatSettings, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self.settings, self.tokenizer, self.dtype = settings, tokenizer, dtype

    def __call__(self, chunk: Chunk) -> TokenizedChunk:
        tokens: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        counts = {"num_too_long": 0, "num_cut": 0}
        bad_lines: list[str] = []
        for number, line in enumerate(chunk.records, chunk.first):
            if not line.strip():
                continue
            try:
                documents = self._fit(self._documents(line), counts)
            except ValueError as error:
                bad_lines.append(f"{chunk.path}:{number}: {error}")
                continue
            tokens += [document for document, _ in documents]
            masks += [mask for _, mask in documents]
        none = [np.empty(0, self.dtype)]
        return TokenizedChunk(
            tokens=np.concatenate(tokens or none),
            lengths=np.array([document.size for document in tokens], dtype=np.int32),
            num_empty=0,
            text_bytes=sum(map(len, chunk.records)),
            bad_lines=bad_lines,
            read_bytes=chunk.read_bytes,
            mask=np.concatenate(masks or none).astype(np.uint8),
            counts=counts,
        )

    def _documents(self, line: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
        record = parse_object(line)
        conversations = pair_of(record) if self.settings.pairs else [conversation_of(record)]
        documents = [self.encode(conversation) for conversation in conversations]
        if len(documents) == 2 and np.array_equal(documents[0][0], documents[1][0]):
            raise ValueError("'chosen' and 'rejected' are equal")
        return documents

    def encode(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, mask of 0 and 1) of one conversation.

        Raises ValueError where the tokenizer joins characters on both sides of an answer's border: a prompt would then
        be other tokens at inference than in training.
        """
        pieces = render(conversation.messages, conversation.tools, conversation.contexts)
        ends = itertools.accumulate(len(text) for text, _ in pieces)
        text = "".join(piece for piece, _ in pieces)
        answers = [
            (end - len(piece), end, answer)
            for (piece, answer), end in zip(pieces, ends, strict=True)
            if answer is not None and answer >= conversation.num_given
        ]
        borders = sorted({place for begin, end, _ in answers for place in (begin, end)} - {len(text)})
        whole, *prefixes = self.tokenizer.encode_batch([text, *(text[:border] for border in borders)])
        token_of = {len(text): len(whole)}
        for border, prefix in zip(borders, prefixes, strict=True):
            if whole[: len(prefix)] != prefix:
                around = text[border - 3 : border + 3]
                raise ValueError(f"the tokenizer joins {around!r} across the border of an answer")
            token_of[border] = len(prefix)
        mask = np.zeros(len(whole) + 1, dtype=np.uint8)
        for begin, end, _ in answers:
            mask[token_of[begin] : token_of[end]] = 1
        mask[-1] = 1  # the last message is an answer, and here it ends
        return np.array([*whole, self.tokenizer.eod_id], dtype=self.dtype), mask

    def _fit(
        self, documents: list[tuple[np.ndarray, np.ndarray]], counts: dict[str, int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        most = self.settings.seq_length + 1
        if sum(tokens.size for tokens, _ in documents) <= most:
            return documents
        if self.settings.too_long == "cut":
            documents = [(tokens[:most], mask[:most]) for tokens, mask in documents]
            if all(mask.any() for _, mask in documents):
                counts["num_cut"] += 1
                return documents
        counts["num_too_long"] += 1
        return []
