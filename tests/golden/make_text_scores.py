"""Records what the packages sacrebleu and rouge-score give for tricky texts, in text_scores.json beside this file.

    pip install sacrebleu rouge-score
    python tests/golden/make_text_scores.py

Recorded with sacrebleu 2.6.0 (corpus_bleu with its defaults: 13a, exp, all four orders) and rouge-score 0.1.2 (rougeL
without stemmer; the best of several references).
"""

import json
import pathlib
import random

import sacrebleu
from rouge_score import rouge_scorer

CASES = {
    "equal": (["the cat sat on the mat"], [["the cat sat on the mat"]]),
    "punctuation": (["Hello, world! How's it (really) going?"], [["Hello world, how is it really going?!"]]),
    "quotes": (["He said: \"No.\" and 'yes'; then [left]."], [["He said, \"no\" and 'yes'; then {left}..."]]),
    "numbers": (["It cost 1,234.56 dollars, i.e. 3-4 times 0.5%."], [["It cost 1,234.56 dollars i.e., 3 - 4 times .5 %"]]),
    "points at the ends": ([".5 and 5. and , 5, ,5 , . a.b 1.b b.1"], [["0.5 and 5 and , 5 ,5 . a.b 1.b b.1 ."]]),
    "hyphens": (["state-of-the-art 2-year 3--4 a-1 1-a -5"], [["state of the art 2-year 3-4 a-1 1 - a -5"]]),
    "entities": (["a &quot;b&quot; &amp; c &lt;d&gt; &amp;lt; &apos;"], [["a \"b\" & c <d> &lt; '"]]),
    "lines": (["one two-\nthree\nfour <skipped>five six"], [["one twothree four five six"]]),
    "white space": (["  a\tb \u00a0c\u3000d\u2009e\x1cf\x0bg \n "], [["a b c d e f g"]]),
    "unicode": (["Die Straße \u00fcber \u201eGro\u00dfe\u201c \u2013 na\u00efve caf\u00e9s\u2026 \u00bfqu\u00e9?"], [["Die Stra\u00dfe \u00fcber \u201egro\u00dfe\u201c - naive cafes... qu\u00e9?"]]),
    "scripts": (["\u4f60\u597d \u4e16\u754c\u3002 \u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0661\u0662,\u0663"], [["\u4f60\u597d \u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440! \u0661\u0662,\u0663"]]),
    "case": (["\u0130stanbul \u212aelvin \u03a3\u0391\u03a3 ABC Def"], [["istanbul kelvin \u03c3\u03b1\u03c2 abc def"]]),
    "emoji and signs": (["ok \U0001f600 100\u20ac $5 #1 @me a_b a*b a/b a\\b ~x`y^z|"], [["ok \U0001f600 100 \u20ac $ 5 # 1 @me a_b a * b a/b x y z"]]),
    "empty hypothesis": ([""], [["something is due here now"]]),
    "empty reference": (["something was said here now"], [[""]]),
    "both empty": ([""], [[""]]),
    "only marks": (["?! ... --"], [["?! ... --"]]),
    "three tokens": (["a small cat"], [["a small cat"]]),
    "one token": (["cat"], [["cat"]]),
    "no common word": (["x y z w v"], [["a b c d e"]]),
    "words without pairs": (["a x b y c z d"], [["a b c d e f g"]]),
    "short among long": (["yes", "the dog ran over the hill again"], [["yes"], ["the dog ran across the hill again"]]),
    "too short": (["the cat"], [["the cat sat on the mat and slept all day long"]]),
    "too long": (["the cat sat on the mat and slept all day long"], [["the cat sat down"]]),
    "repeated": (["the the the the the the the"], [["the cat is on the mat"]]),
    "two references": (["It is a guide to action which ensures that the military always obeys the commands of the party"],
        [["It is a guide to action that ensures that the military will forever heed Party commands",
          "It is the guiding principle which guarantees the military forces always being under the command of the Party",
          "It is the practical guide for the army always to heed the directions of the party"]]),
    "clipped over references": (["the the cat the the cat sat"], [["the cat the cat", "the the the sat sat"]]),
    "lengths equally far": (["a b c d e"], [["a b c d e f g", "a b c", "x"]]),
    "unequal numbers of references": (["the red fox jumps over it", "a lazy dog slept all day"],
        [["the red fox jumped over it", "a red fox jumps over it"], ["the lazy dog slept all day"]]),
    "one hypothesis empty": (["", "the lazy dog slept all day"], [["the red fox"], ["the lazy dog slept all day"]]),
}


def drawn(seed):
    """A corpus of drawn texts whose references are edits of them."""
    draw = random.Random(seed)
    pieces = ["the", "cat", "Dog", "1,5", "3.14", "2-3", "it's", "(so)", "well-known", "\u00e9t\u00e9", "end.", "a.m.,", "&amp;", "\"", "x_y", "7%"]
    hypotheses, references = [], []
    for _ in range(12):
        words = [draw.choice(pieces) for _ in range(draw.randrange(0, 14))]
        of = []
        for _ in range(draw.randrange(1, 4)):
            other = [w if draw.random() < 0.7 else draw.choice(pieces) for w in words]
            of.append(" ".join(w for w in other if draw.random() < 0.9) or "none")
        hypotheses.append(" ".join(words))
        references.append(of)
    return hypotheses, references


def main():
    cases = dict(CASES)
    for seed in range(8):
        cases[f"drawn {seed}"] = drawn(seed)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    out = []
    for name, (hypotheses, references) in cases.items():
        most = max(len(r) for r in references)
        streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
        bleu = sacrebleu.corpus_bleu(hypotheses, streams).score
        rouge = [scorer.score_multi(r, h)["rougeL"].fmeasure for h, r in zip(hypotheses, references)]
        out.append({"name": name, "hypotheses": hypotheses, "references": references, "bleu": bleu, "rouge_l": rouge})
    path = pathlib.Path(__file__).with_name("text_scores.json")
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in out)
    path.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
