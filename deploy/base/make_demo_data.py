#!/usr/bin/env python3
"""Writes adapters/demo-data: three small training sets for the bundled base, with held-out rows.

    python deploy/base/make_demo_data.py --text TEXT_DIR --out adapters/demo-data

style/       {"text"}                 Shakespeare, speeches packed into chunks of 300 to 600 characters
cards/       {"prompt", "completion"} a story sentence -> a one-line card, made by the rule in `card`
text-kind/   {"text", "label"}        which kind of text a sentence comes from: story, play, encyclopedia

TEXT_DIR is laid out as corpus.py says.  Standard library only; the same input gives the same bytes.
"""
from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

import corpus

NOT_NAMES = set("""I Mom Mommy Dad Daddy Mama Papa Grandma Grandpa The He She They It We You His Her Their Suddenly Once One
But And So As When Then After Yes No Oh Wow Hello Hi Thank Let What Why Where How Can Do Please Sorry Don My Your This
That There If Not Look Are Is In On At To From Every Everyone Finally Together Mr Mrs Miss Okay""".split())
INSTRUCTION = "Make a card for this sentence."


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(f"{path.parent.name}/{path.name}: {len(rows)} rows, {path.stat().st_size} bytes")


def style(speeches: list[str], limit: int, rng: random.Random) -> list[dict]:
    """Runs of neighbouring speeches, joined by a blank line, 300 to 600 characters each."""
    chunks, now = [], ""
    for s in speeches:
        if now and len(now) + 2 + len(s) > 600:
            if len(now) >= 300:
                chunks.append(now)
            now = ""
        if len(s) <= 600:
            now = f"{now}\n\n{s}" if now else s
    rng.shuffle(chunks)
    out, size = [], 0
    for c in chunks:
        size += len(c)
        if size > limit:
            break
        out.append({"text": c})
    return out


def names_of(stories: list[str]) -> set[str]:
    """Capitalised words that the stories introduce by `named X`, or use inside sentences three times and more."""
    text = "\n".join(stories)
    seen = Counter(re.findall(r"(?<=[a-z,] )([A-Z][a-z]{2,})\b", text))
    return (set(re.findall(r"\bnamed ([A-Z][a-z]+)", text)) | {w for w, n in seen.items() if n >= 3}) - NOT_NAMES


def card(sentence: str, names: set[str]) -> str | None:
    """`who: NAME | speech: yes or no | last: WORD`, or None where the sentence has not exactly one name."""
    found = {w for w in re.findall(r"\b[A-Z][a-z]+\b", sentence) if w in names}
    words = re.findall(r"[A-Za-z]+", sentence)
    if len(found) != 1 or not 35 <= len(sentence) <= 130 or sentence.count('"') not in (0, 2) or "'" in sentence[-8:]:
        return None
    who = found.pop()
    if words[-1] == who or len(words[-1]) < 3:
        return None
    return f"who: {who} | speech: {'yes' if chr(34) in sentence else 'no'} | last: {words[-1].lower()}"


def cards(stories: list[str], names: set[str], want: int, seen: set[str], rng: random.Random) -> list[dict]:
    pool = []
    for s in stories:
        for sentence in corpus.sentences(s.replace("\n", " ")):
            done = card(sentence, names)
            if done and sentence not in seen:
                seen.add(sentence)
                pool.append((sentence, done))
    rng.shuffle(pool)
    pool.sort(key=lambda x: "speech: yes" not in x[1])           # speech first: it is the rarer kind
    speech = [x for x in pool if "speech: yes" in x[1]]
    plain = [x for x in pool if "speech: no" in x[1]]
    per_name, rows = Counter(), []
    for kind, quota in ((speech, want * 2 // 5), (plain, want)):
        for sentence, done in kind:
            who = done.split(" | ")[0]
            if len(rows) >= quota or per_name[who] >= max(3, want // 12):
                continue
            per_name[who] += 1
            rows.append({"prompt": f"{INSTRUCTION}\n{sentence}\n", "completion": done})
    rng.shuffle(rows)
    return rows


def kinds(sets: dict[str, list[str]], per_label: dict[str, int], seen: set[str], rng: random.Random) -> list[dict]:
    rows = []
    for label, texts in sets.items():
        texts = [t for t in dict.fromkeys(texts) if 40 <= len(t) <= 220]
        rng.shuffle(texts)
        taken = 0
        for t in texts:
            key = re.sub(r"\W+", " ", t.lower()).strip()
            if key in seen or taken >= per_label[label]:
                continue
            seen.add(key)
            taken += 1
            rows.append({"text": t, "label": label})
        if taken < per_label[label]:
            raise SystemExit(f"only {taken} sentences of kind {label}")
    rng.shuffle(rows)
    return rows


def spoken(speeches: list[str]) -> list[str]:
    """Sentences of the plays in one line, without the speakers' names."""
    out = []
    for s in speeches:
        head, _, body = s.partition(":\n")
        if body:
            out += corpus.sentences(body.replace("\n", " "))
    return out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--text", type=Path, required=True)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--seed", type=int, default=5)
    a = ap.parse_args()
    t = a.text
    rng = random.Random(a.seed)
    train, val = corpus.stories(t, "train"), corpus.stories(t, "val")
    plays, plays_val = corpus.speeches(t, "train"), corpus.speeches(t, "val")
    wiki = corpus.articles(t, "test")                                  # the base has seen the other split
    cut = len(wiki) * 4 // 5

    write(a.out / "style/train.jsonl", style(plays, 180_000, rng))
    write(a.out / "style/heldout.jsonl", style(plays_val, 24_000, rng))

    names, seen = names_of(train + val), set()
    write(a.out / "cards/train.jsonl", cards(train, names, 400, seen, rng))
    write(a.out / "cards/heldout.jsonl", cards(val, names, 50, seen, rng))

    line = lambda docs: [s for d in docs for s in corpus.sentences(d.replace("\n", " "))]
    seen = set()
    write(a.out / "text-kind/train.jsonl", kinds(
        {"story": line(train), "play": spoken(plays), "encyclopedia": line(wiki[:cut])},
        dict(story=300, play=300, encyclopedia=300), seen, rng))
    write(a.out / "text-kind/heldout.jsonl", kinds(
        {"story": line(val), "play": spoken(plays_val), "encyclopedia": line(wiki[cut:])},
        dict(story=67, play=67, encyclopedia=66), seen, rng))
    (a.out / "text-kind/labels.json").write_text(json.dumps(["story", "play", "encyclopedia"]) + "\n")


if __name__ == "__main__":
    main()
