"""SentencePiece BPE model to the ``tokenizers`` library's tokenizer.json, with identical ids.

transformers' own conversion of a bare tokenizer.model gives other ids in runs of spaces, so the merges are rebuilt
here: every way to split a piece into two pieces is a merge, ranked by the score of the result, longest left part
first. Equality of ids is tested on every bundled document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hymba_train.data.user_files import write_or_refuse
from hymba_train.errors import UserError

SPACE = "\u2581"
"""SentencePiece's visible space."""


def convert_sentencepiece(model: bytes, extra_special: Sequence[str] = ()) -> str:
    """tokenizer.json text for a SentencePiece BPE model.

    Args:
        model: content of the .model file (BPE, identity normalisation, dummy prefix, byte fallback: Llama's form).
        extra_special: special tokens to add behind the vocabulary, e.g. ``[PAD]`` as Hymba's id 32000.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    processor = SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    special = [i for i in vocab.values() if processor.is_control(i) or processor.is_unknown(i)]
    special_names = [processor.id_to_piece(i) for i in special]
    merges = []
    for piece, i in vocab.items():
        if i in special or processor.is_byte(i):
            continue
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(processor.get_score(i), left, right) for left, right in cuts if left in vocab and right in vocab]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    unknown = processor.id_to_piece(processor.unk_id())
    fast = Tokenizer(
        models.BPE(vocab=vocab, merges=[merge[1:] for merge in merges], unk_token=unknown, fuse_unk=True,
                   byte_fallback=True)
    )  # fmt: skip
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    if not any(SPACE in piece.lstrip(SPACE) for piece in vocab):
        # No merge joins a letter to the space after it, so words can be merged one by one (and cached): same ids.
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+"), "isolated")
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (*special_names, *extra_special)]
    )
    return fast.to_str(pretty=False)


def write_tokenizer(model: bytes, directory: str | Path, extra_special: Sequence[str] = ()) -> None:
    """Write tokenizer.model and tokenizer.json into ``directory`` (made if missing).

    Raises UserError when ``model`` is not a SentencePiece BPE model.
    """
    path = Path(directory)
    try:
        converted = convert_sentencepiece(model, extra_special)
    except RuntimeError as error:
        raise UserError(f"not a SentencePiece model: {error}") from error
    path.mkdir(parents=True, exist_ok=True)
    write_or_refuse(path / "tokenizer.model", model)
    write_or_refuse(path / "tokenizer.json", converted.encode())
