"""Text to tokens and back: GPT-2's byte-pair encoding, or plain bytes. Never uses the network."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from speedrun.data import BYTES, GPT2, DataError, DataFormat

RANK_FILE = "gpt2.tiktoken"
# Of the public vocabulary in tiktoken's form, and of the merges it can be made from. With these
# two, where a file came from doesn't matter.
RANK_FILE_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

BOS_TEXT = "<|endoftext|>"
# How GPT-2 cuts text before merging: contractions, words, numbers, other signs, white space.
_SPLIT_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's regex engine gives up on a run of white space of a million characters or more.
_MAX_WHITE_SPACE = 900_000


class Tokenizer:
    """What both tokenizers share: `encode` is theirs, `token_bytes` gives the rest."""

    format: DataFormat

    def encode(self, text: str | bytes) -> np.ndarray:
        """The text's tokens, uint16, without BOS. `<|endoftext|>` in it is ordinary text."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; BOS gives `<|endoftext|>`. DataError if out of range."""
        raise NotImplementedError

    def decode(self, tokens: Iterable[int]) -> str:
        """The tokens' text; bytes that are not UTF-8 come out as U+FFFD."""
        return b"".join(self.token_bytes(int(t)) for t in tokens).decode("utf-8", "replace")

    def _check(self, token: int) -> None:
        if not 0 <= token < self.format.vocab_size:
            raise DataError(
                f"token {token} is outside the vocabulary of {self.format.tokenizer} "
                f"(0 to {self.format.vocab_size - 1})"
            )


class ByteTokenizer(Tokenizer):
    """Token = byte; 256 is BOS."""

    format = BYTES

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, str):
            text = text.encode("utf-8", "replace")  # half a surrogate pair, as JSON may hold
        return np.frombuffer(text, np.uint8).astype(np.uint16)

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        return BOS_TEXT.encode() if token == BYTES.bos_id else bytes([token])


class GPT2Tokenizer(Tokenizer):
    """GPT-2's vocabulary from a local rank file. Only `encode` needs the package tiktoken."""

    format = GPT2

    def __init__(self, rank_file: Path | str):
        self.rank_file = Path(rank_file)
        self._bytes = parse_ranks(self.rank_file)

    @functools.cached_property
    def _encoding(self):
        try:
            import tiktoken
        except ImportError as error:
            raise DataError(
                "GPT-2's tokenizer needs the package tiktoken, which is not installed; "
                "pip install 'nanogpt-speedrun[cli]', or use --tokenizer bytes"
            ) from error
        return tiktoken.Encoding(
            name="gpt2",
            pat_str=_SPLIT_PATTERN,
            mergeable_ranks={piece: rank for rank, piece in enumerate(self._bytes)},
            special_tokens={BOS_TEXT: GPT2.bos_id},
            explicit_n_vocab=GPT2.vocab_size,
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"byte {error.start} of the text is not UTF-8, which GPT-2's tokenizer wants; "
                    "convert the text, or use --tokenizer bytes"
                ) from error
        if len(text) > _MAX_WHITE_SPACE:
            for run in re.finditer(r"\s+", text):
                if run.end() - run.start() > _MAX_WHITE_SPACE:
                    raise DataError(
                        f"{run.end() - run.start():,} white-space characters in a row at character "
                        f"{run.start():,}, GPT-2's tokenizer takes {_MAX_WHITE_SPACE:,}; "
                        "shorten the run"
                    )
        return np.array(self._encoding.encode_ordinary(text), np.uint16)

    def token_bytes(self, token: int) -> bytes:
        self._check(token)
        return BOS_TEXT.encode() if token == GPT2.bos_id else self._bytes[token]


def parse_ranks(rank_file: Path) -> list[bytes]:
    """The bytes of GPT-2's tokens 0 to 50,255 from a file of `base64 rank` lines.

    DataError if the file is absent, or isn't GPT-2's public vocabulary.
    """
    try:
        content = rank_file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{rank_file}: GPT-2's rank file can't be read ({error.strerror}); "
            "`speedrun data fetch` stores it beside the shards"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != RANK_FILE_SHA256:
        raise DataError(
            f"{rank_file}: not GPT-2's public rank file: {len(content.splitlines()):,} lines of "
            f"50,256, sha256 {digest} and not {RANK_FILE_SHA256}; delete it, and "
            "`speedrun data fetch` stores it anew"
        )
    return [base64.b64decode(line.split()[0]) for line in content.splitlines()]


def ranks_from_merges(merges: bytes) -> bytes:
    """The rank file made from GPT-2's `vocab.bpe`: 256 single bytes, then a merge a line."""
    # vocab.bpe spells each byte as one visible character: itself where it is visible in Latin-1,
    # else the next free character from 256 on. The single bytes are ranked in that order too.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(hidden)}
    pieces = [bytes([byte]) for byte in (*visible, *hidden)]
    for line in merges.decode("utf-8").splitlines()[1:]:  # the first line is a version
        pieces.append(bytes(byte_of[char] for char in line if char != " "))
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


def load_tokenizer(
    name: str, rank_file: Path | str | None = None, folder: Path | str | None = None
) -> Tokenizer:
    """The tokenizer "gpt2" or "bytes".

    GPT-2's rank file is `rank_file`, else `gpt2.tiktoken` in the data folder given. DataError for
    another name, or where there is no good rank file.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise DataError(f"tokenizer {name!r}: there are gpt2 and bytes")
    if rank_file is None:
        if folder is None:
            raise DataError(
                "GPT-2's tokenizer wants its rank file: `speedrun data fetch` stores "
                f"{RANK_FILE} beside the shards, --rank-file FILE names another place"
            )
        rank_file = Path(folder) / RANK_FILE
    return GPT2Tokenizer(rank_file)
