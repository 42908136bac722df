"""Reading and cleaning of the text that the bundled base and the demo data are made from.

The text folder (`--text`) holds, in this layout (a missing file is left out, with a warning):

    tinystories-sample/train.txt, val.txt   stories, a line `<|endoftext|>` after each (CDLA-Sharing-1.0)
    wikitext2/valid.txt, test.txt           WikiText-2 as published, tokenised, with `<unk>` (CC BY-SA 3.0)
    tinyshakespeare/train.txt, val.txt      plays, speeches split by blank lines (public domain)
"""
from __future__ import annotations

import re
import sys
from pathlib import Path

PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " "})


def read(root: Path, name: str) -> str:
    path = Path(root) / name
    if not path.is_file():
        print(f"warning: no {name} in the text folder: left out", file=sys.stderr)
        return ""
    return path.read_text(encoding="utf-8")


def stories(root: Path, split: str) -> list[str]:
    """TinyStories, one string per story; broken characters out, plain quotes."""
    out = []
    for doc in read(root, f"tinystories-sample/{split}.txt").split("<|endoftext|>"):
        doc = doc.translate(PLAIN).encode("ascii", "ignore").decode()
        doc = "\n".join(line.strip() for line in doc.splitlines() if line.strip())
        if len(doc) >= 80:
            out.append(doc)
    return out


def untokenise(text: str) -> str:
    """WikiText's ` , ` and ` @-@ ` back to ordinary writing."""
    text = re.sub(r" @([-,.])@ ", r"\1", text.translate(PLAIN))
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r"\( ", "(", re.sub(r" \)", ")", text))
    text = re.sub(r" ([,.;:!?%])", r"\1", text)
    return re.sub(r" ('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1", text).replace(" '", "'").strip()


def sentences(text: str) -> list[str]:
    return [s.strip() for s in re.split(r'(?<=[.!?]["\')])\s+|(?<=[.!?])\s+(?=[A-Z"\'(])', text) if s.strip()]


def articles(root: Path, split: str) -> list[str]:
    """WikiText-2 paragraphs without headings; sentences with `<unk>` or non-ASCII letters are left out."""
    out = []
    for line in read(root, f"wikitext2/{split}.txt").splitlines():
        line = line.strip()
        if not line or line.startswith("= "):
            continue
        keep = [s for s in sentences(untokenise(line)) if "<unk>" not in s and s.isascii() and s.count('"') % 2 == 0]
        para = " ".join(keep)
        if len(para) >= 80:
            out.append(para)
    return out


def speeches(root: Path, split: str) -> list[str]:
    """Shakespeare, one speech (`NAME:` and its lines) per string."""
    text = read(root, f"tinyshakespeare/{split}.txt").translate(PLAIN)
    return [s.strip() for s in re.split(r"\n\s*\n", text) if s.strip()]
