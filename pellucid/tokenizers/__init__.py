"""Tokenizers: text to token ids and back, one small adapter per file format, nothing else of
Pellucid needed.

    tokenizer = pellucid.tokenizers.load("path/to/model")
    ids = tokenizer.encode("hello", bos=True)
    tokenizer.decode(ids)

| module | format | engine |
|---|---|---|
| llama3.py | tokenizer.model with base64 ranks | tiktoken |
| sentence_piece.py | tokenizer.model of Llama 1 and 2 | sentencepiece |
| gpt2.py | encoder.json + vocab.bpe, vocab.json + merges.txt | tiktoken |
| hf.py | tokenizer.json | tiktoken where it gives the same ids, else tokenizers |
| gguf.py | the keys of a GGUF file | those of hf.py and sentence_piece.py |

base.py holds the shared interface and streaming, bytelevel.py the byte-level BPE, chat.py the
conversation formats, templates.py runs a checkpoint's template, marked.py tells its words from
those of messages, detect.py finds the format, train.py learns a vocabulary. An engine is imported
when a tokenizer needs it.
"""

from pellucid.tokenizers.base import StreamDecoder, Tokenizer
from pellucid.tokenizers.chat import ChatFormat, Llama2Chat, Llama3Chat, TemplateChat
from pellucid.tokenizers.detect import load
from pellucid.tokenizers.train import train_bpe, train_characters

__all__ = [
    "ChatFormat",
    "Llama2Chat",
    "Llama3Chat",
    "StreamDecoder",
    "TemplateChat",
    "Tokenizer",
    "load",
    "train_bpe",
    "train_characters",
]
