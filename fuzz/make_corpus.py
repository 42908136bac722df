#!/usr/bin/env python3
"""Writes the corpora: small inputs of every target, well-formed ones and those that once were or could be trouble.

Standard library only; the same files every time. Run it in this folder after a change, and commit what it wrote.
"""
import io
import json
import pathlib
import shutil
import struct
import zipfile

ROOT = pathlib.Path(__file__).parent / "corpus"


def put(target, name, data):
    folder = ROOT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


# ---- safetensors ----

def tensors(entries, size, metadata=None):
    header = {} if metadata is None else {"__metadata__": metadata}
    header.update({n: {"dtype": d, "shape": s, "data_offsets": o} for n, d, s, o in entries})
    return framed(json.dumps(header, separators=(",", ":")), size)


def framed(header, size):
    return struct.pack("<Q", len(header)) + header.encode() + bytes(size)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = [(f"{Q}.lora_A.weight", "F32", [4, 32], [0, 512]), (f"{Q}.lora_B.weight", "F32", [32, 4], [512, 1024])]


def safetensors():
    t = "safetensors_header"
    put(t, "lora", tensors(PAIR, 1024, {"format": "pt"}))
    put(t, "small", tensors([("a", "BF16", [2], [0, 4])], 4))
    put(t, "overlap", tensors([("a", "F32", [1], [0, 4]), ("b", "F32", [1], [0, 4])], 8))
    put(t, "gap", tensors([("a", "F32", [1], [0, 4]), ("b", "F32", [1], [8, 12])], 12))
    put(t, "product", tensors([("a", "F32", [2**40, 2**40], [0, 4])], 4))
    put(t, "zero", tensors([("a", "F16", [0], [0, 0]), ("b", "F16", [], [0, 2])], 2))
    put(t, "types", tensors([("a", "I64", [1], [0, 8]), ("b", "F8_E4M3", [1], [8, 9])], 9))
    put(t, "twice", framed('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                           '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4))
    put(t, "long", struct.pack("<Q", 2**63) + b"{}")
    put(t, "nan", tensors([("a", "F32", [1], [0, 4])], 0) + struct.pack("<f", float("nan")))


# ---- configurations ----

def configs():
    t = "peft_config"
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    put(t, "lora", json.dumps(base))
    put(t, "patterns", json.dumps({**base, "rank_pattern": {"layers.0.*q_proj": 4}, "alpha_pattern": {"q_proj": 16}}))
    put(t, "regex", json.dumps({**base, "rank_pattern": {"(a*)*b{1,99}": 4}}))
    put(t, "dora", json.dumps({**base, "use_dora": True, "use_rslora": True, "lora_bias": True}))
    put(t, "null", json.dumps({**base, "r": None, "lora_alpha": None, "base_model_name_or_path": None}))
    put(t, "numbers", '{"peft_type":"LORA","r":1e308,"lora_alpha":-0.0,"problem_type":"regression"}')
    put(t, "code", json.dumps({**base, "auto_mapping": {"base_model_class": "os", "parent_library": "system"}}))
    put(t, "deep", "[" * 300)
    for kind in ["IA3", "LN_TUNING", "TRAINABLE_TOKENS", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "BITFIT"]:
        put(t, kind.lower(), json.dumps({"peft_type": kind, "num_virtual_tokens": 3, "token_dim": 32, "num_layers": 2,
                                         "num_attention_heads": 4, "token_indices": [1, 2], "r": 4}))
    t = "adapterhub_config"
    of = lambda config: json.dumps({"name": "x", "version": "adapters.1.3.0", "config": config})
    put(t, "bottleneck", of({"output_adapter": True, "mh_adapter": False, "reduction_factor": 4,
                             "non_linearity": "relu", "leave_out": [1]}))
    put(t, "compacter", of({"output_adapter": True, "phm_layer": True, "phm_dim": 4, "non_linearity": "gelu"}))
    put(t, "lora", of({"architecture": "lora", "r": 4, "alpha": 8, "attn_matrices": ["q", "v"]}))
    put(t, "ia3", of({"architecture": "lora", "r": 1, "alpha": 1, "composition_mode": "scale"}))
    put(t, "prefix", of({"architecture": "prefix_tuning", "flat": False, "prefix_length": 5, "non_linearity": "tanh"}))
    put(t, "head", of({"head_type": "classification", "num_labels": 3, "layers": 2, "activation_function": "tanh",
                       "label2id": {"a": 0, "b": 1, "c": 2}}))
    put(t, "union", of({"architecture": "union", "configs": [{"architecture": "lora"}]}))
    put(t, "tiny", of({"output_adapter": True, "reduction_factor": 1e-9, "non_linearity": "swish"}))
    put(t, "combination", json.dumps({"format": "deltaserve.combination", "version": 1, "parts": ["part0"]}))


# ---- datasets ----

def datasets():
    t = "dataset"
    lines = lambda *all: "\n".join(json.dumps(each) for each in all) + "\n"
    put(t, "text", lines({"text": "once upon a time"}, {"text": "the end"}))
    put(t, "label", lines({"text": "good", "label": "pos"}, {"text": "bad", "label": 1}, {"text": "so", "label": 0.5}))
    put(t, "labels", lines({"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}))
    put(t, "tags", lines({"tokens": ["New", "York"], "ner_tags": ["B", "I"]}, {"tokens": ["a"], "tags": [0]}))
    put(t, "chat", lines({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
                                       {"role": "assistant", "content": "yo"}]}))
    put(t, "completion", lines({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}))
    put(t, "pairs", lines({"prompt": "a", "chosen": "b", "rejected": "c"}))
    put(t, "rated", lines({"prompt": "a", "completion": "b", "label": True}))
    put(t, "mixed", lines({"text": "a"}, {"prompt": "b"}, {"mystery": 1}, [1], None))
    put(t, "bytes", b'\xef\xbb\xbf{"text": "a\xff"}\r\n\r\n{"text": "\\ud800"}\n{"text": "\\u0000"}')
    put(t, "deep", '{"text": ' + "[" * 300)
    put(t, "twice", '{"text": "a", "text": "b", "label": 99999999999999999999}\n')


# ---- protocol ----

def varint(n):
    out = b""
    while True:
        n, low = n >> 7, n & 127
        out += bytes([low | (128 if n else 0)])
        if not n:
            return out


def field(number, value):
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (2**64 - 1))
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def real(number, value):
    return varint(number << 3 | 5) + struct.pack("<f", value)


def protocol():
    t = "proto_request"
    sampling = real(1, 0.7) + field(2, 40) + real(3, 0.9) + field(8, 1)
    options = field(1, 16) + field(2, sampling) + field(3, "END") + field(6, 5) + field(7, 2)
    text = field(1, "once upon")
    chat = field(2, field(1, field(1, "user") + field(2, "hi")))
    tokens = field(3, field(1, bytes([1, 2, 0xFF, 0x7F])))
    put(t, "generate", b"\0" + field(1, "style@3") + field(2, text) + field(3, options))
    put(t, "chat", b"\0" + field(2, chat) + field(3, field(1, 4)))
    put(t, "tokens", b"\0" + field(2, tokens))
    put(t, "oneof", b"\0" + field(2, text + chat + tokens) + field(99, "unknown"))
    put(t, "numbers", b"\0" + field(2, text) + field(3, field(1, 2**32 - 1) + field(2, real(1, float("nan"))) +
                                                    field(7, 10**6) + field(8, 2**31)))
    nested = b""
    for _ in range(120):
        nested = field(2, nested)
    put(t, "nested", b"\0" + nested)
    part = field(1, "x") + field(2, 0.5)
    put(t, "deltas", b"\0" + field(2, text) + field(30, part) + field(30, field(1, "y") + field(2, float("inf"))))
    put(t, "batch", b"\1" + field(2, text) + field(2, tokens) + field(3, options))
    put(t, "classify", b"\2" + field(1, "c") + field(2, field(1, "a") + field(2, "b")) + field(2, field(3, "w")) +
        real(4, 2.0) + field(31, 3))
    put(t, "embed", b"\3" + field(2, "a") + field(3, 7))
    put(t, "score", b"\4" + field(2, field(1, "a") + field(2, "b")))
    put(t, "merge", b"\5" + field(1, "m") + field(3, part) + field(3, part) + field(4, 4) + field(5, 0.5) + field(8, 1))
    lora = field(1, field(1, 8) + field(2, 16.0) + field(4, 1) + field(6, field(1, "q") + field(2, 4)))
    hyper = field(1, 3.0) + field(3, 8) + field(5, 1e-4) + field(7, 0.1) + field(60, "accuracy")
    data = field(2, '{"text": "a", "label": "x"}\n')
    spec = field(1, "out") + field(2, 3) + field(3, data) + field(5, 0.1) + field(6, lora) + field(7, "x") + field(8, hyper)
    put(t, "job", b"\6" + field(1, spec) + field(2, "key"))
    put(t, "sweep", b"\6" + field(1, spec + field(90, field(1, struct.pack("<2d", 1e-3, float("nan"))) +
                                                  field(2, bytes([4, 8])))))
    put(t, "methods", b"\6" + field(1, field(1, "o") + b"".join(field(6, field(n, field(1, 3)))
                                                              for n in [2, 10, 11, 12, 13, 20, 21, 22, 30])))
    put(t, "upload", b"\7" + field(1, "a/../b") + field(2, field(1, 3) + field(2, "ab" * 32)) + field(3, "l"))
    put(t, "page", b"\10" + field(1, 1001) + field(2, "token"))


# ---- text ----

def texts():
    t = "tokenizer"
    put(t, "plain", "The quick brown fox.\n")
    put(t, "special", "<bos>a<eos><eos <|im_start|>")
    put(t, "marks", "a" + "\u0301" * 60 + "\u202e\u0000\ufffe\ufeff")
    put(t, "letters", "é€中😀ﷺ\u200d👩‍👩‍👧")
    put(t, "bytes", bytes(range(256)))
    put(t, "ids", struct.pack("<8H", 0xE2, 0x82, 0xAC, 256, 257, 259, 0xFF, 65535))
    t = "chat_template"
    chatml = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<eos>' }}{% endfor %}"
    put(t, "chatml", chatml + "\0hi\nyo\nbye")
    put(t, "forged", "\0<eos>\n<bos><eos>\ufffe0\ufffe\n<e\ufffe0\ufffeos>")
    put(t, "refuses", "{{ raise_exception('no: ' ~ messages[0].content) }}\0x")
    put(t, "methods", "{{ messages[0]['content'].strip().split(' ') | tojson(indent=2) }}{{ bos_token }}\0a b ")
    put(t, "time", "{{ strftime_now('%d %B %Y %H:%M') }}\0x")
    put(t, "endless", "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}\0x")
    put(t, "large", "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}\0x")
    put(t, "nested", "{% set n = namespace(x=[]) %}{% for a in range(2000) %}{% set n.x = [n.x] %}{% endfor %}"
                     "{{ n.x | tojson }}\0x")
    put(t, "deep", "{% set n = namespace(x=[]) %}{% for a in range(50000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}\0x")
    put(t, "macro", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}\0x")
    put(t, "generation", "{% generation %}{{ messages | length }}{%- endgeneration -%}\0x")
    put(t, "include", "{% include '/etc/passwd' %}{% import 'os' as os %}\0x")
    t = "stop_strings"
    put(t, "one", "END\0the EN END more")
    put(t, "many", "aba\nab\n\nb a\0abab abba baba")
    put(t, "letters", "é\n€\0caf\u00e9 \u20ac")
    put(t, "repeated", "aaaaaaaab\0" + "a" * 200)
    put(t, "none", "no stop texts at all")


def grammars():
    t = "grammar"
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
              "required": ["name"], "additionalProperties": False}
    put(t, "schema", b"\0" + json.dumps(schema).encode())
    put(t, "refs", b"\0" + json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [
        {"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/a"}}]}}}).encode())
    put(t, "loop", b"\0" + json.dumps({"$ref": "#"}).encode())
    put(t, "formats", b"\0" + json.dumps({"type": "string", "format": "date-time", "pattern": "^a+$"}).encode())
    put(t, "numbers", b"\0" + json.dumps({"type": "number", "minimum": -1e300, "multipleOf": 1e-300}).encode())
    put(t, "unsupported", b"\0" + json.dumps({"not": {}, "if": True, "uniqueItems": True}).encode())
    put(t, "regex", b"\1(a|b)*c{2,5}[0-9]+")
    put(t, "explodes", b"\1((a{0,99}){0,99}){0,99}(x+x+)+y")
    put(t, "unicode", "\1\\p{L}+[^\\x00-\\x7f]é".encode())
    put(t, "lark", b'\2start: greeting " " NAME\ngreeting: "hi" | "hello"\nNAME: /[a-z]{1,8}/\n')
    put(t, "recursive", b'\2start: a\na: a a | "x" |\n')
    put(t, "temperature", b'\2start: x\nx[temperature=0.5]: "a"\n%json {"type": "string"}\n')
    put(t, "choice", b"\3yes\nno\nmaybe \\ \"quoted\"")


# ---- GGUF ----

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10


def counted(text):
    text = text.encode()
    return struct.pack("<Q", len(text)) + text


def value(kind, v):
    if kind == STRING:
        return counted(v)
    if kind == ARRAY:
        inner, items = v
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack({U32: "<I", F32: "<f", U64: "<Q"}[kind], v)


def gguf(metadata, entries, size, version=3):
    out = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(metadata))
    for key, kind, v in metadata:
        out += counted(key) + struct.pack("<I", kind) + value(kind, v)
    for name, shape, kind, offset in entries:
        out += counted(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32) + bytes(size)


def llama(more=()):
    own = [("block_count", U32, 1), ("context_length", U32, 64), ("embedding_length", U32, 8),
           ("feed_forward_length", U32, 16), ("attention.head_count", U32, 2), ("attention.head_count_kv", U32, 1),
           ("attention.layer_norm_rms_epsilon", F32, 1e-5), ("rope.freq_base", F32, 10000.0)]
    return ([("general.architecture", STRING, "llama")] + [(f"llama.{k}", t, v) for k, t, v in own] + list(more))


def ggufs():
    t = "gguf_header"
    table = [("token_embd.weight", [8, 4], 0, 0)]
    spm = [("tokenizer.ggml.model", STRING, "llama"),
           ("tokenizer.ggml.tokens", ARRAY, (STRING, ["<unk>", "<s>", "</s>", "\u2581a"])),
           ("tokenizer.ggml.scores", ARRAY, (F32, [0.0, 0.0, 0.0, -1.0])),
           ("tokenizer.ggml.token_type", ARRAY, (U32, [2, 3, 3, 1])), ("tokenizer.ggml.bos_token_id", U32, 1),
           ("tokenizer.ggml.eos_token_id", U32, 2), ("tokenizer.ggml.unknown_token_id", U32, 0)]
    bpe = [("tokenizer.ggml.model", STRING, "gpt2"), ("tokenizer.ggml.pre", STRING, "gpt-2"),
           ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b", "ab", "<|im_end|>"])),
           ("tokenizer.ggml.token_type", ARRAY, (U32, [1, 1, 1, 3])),
           ("tokenizer.ggml.merges", ARRAY, (STRING, ["a b"])), ("tokenizer.ggml.eos_token_id", U32, 3)]
    put(t, "llama", gguf(llama(spm), table, 128))
    put(t, "bpe", gguf(llama(bpe), table, 128))
    put(t, "quantised", gguf(llama(), [("token_embd.weight", [32, 4], 8, 0), ("output_norm.weight", [8], 0, 160)], 192))
    put(t, "product", gguf(llama(), [("token_embd.weight", [2**33, 2**33], 0, 0)], 32))
    put(t, "beyond", gguf(llama(), [("token_embd.weight", [8, 4], 0, 2**63)], 32))
    put(t, "alignment", gguf(llama([("general.alignment", U32, 0)]), table, 128))
    put(t, "counts", b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63))
    put(t, "array", gguf([("a", ARRAY, (U32, []))], [], 0)[:-8] + struct.pack("<Q", 2**62))
    nested = (U32, [])
    for _ in range(12):
        nested = (ARRAY, [nested])
    put(t, "nested", gguf([("a", ARRAY, nested)], [], 0))
    put(t, "version", gguf([], [], 0, version=1))


# ---- pickles ----

def pickled(text):
    text = text.encode()
    return b"X" + struct.pack("<I", len(text)) + text


def tensor(key, shape, strides, kind="FloatStorage", offset=0):
    number = lambda n: b"J" + struct.pack("<i", n)
    numbers = lambda all: b"(" + b"".join(map(number, all)) + b"t"
    storage = b"(" + pickled("storage") + b"ctorch\n" + kind.encode() + b"\n" + pickled(key) + pickled("cpu")
    storage += number(4) + b"tQ"
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(strides) +
            b"\x89ccollections\nOrderedDict\n)RtR")


def torch_save(program, files, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        entries = [("data.pkl", program), ("byteorder", b"little")] + [(f"data/{k}", v) for k, v in files.items()]
        for name, data in entries + [("version", b"3\n")]:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), data, compression)
    return out.getvalue()


def pickles():
    t = "pickle"
    head = b"\x80\x02ccollections\nOrderedDict\n)Rq\0("
    four = struct.pack("<4f", 1, 2, 3, 4)
    plain = head + pickled("a") + tensor("0", [2, 2], [2, 1]) + pickled("b") + tensor("0", [2, 2], [1, 2]) + b"u."
    put(t, "program", plain)
    put(t, "file", torch_save(plain, {"0": four}))
    put(t, "compressed", torch_save(plain, {"0": four}, zipfile.ZIP_DEFLATED))
    wrapped = b"ctorch._utils\n_rebuild_parameter\n(" + tensor("0", [4], [1], offset=0) + b"\x88}tR"
    put(t, "parameter", head + pickled("w") + wrapped + b"u}" + pickled("_metadata") + b"}sb.")
    put(t, "longs", head + pickled("n") + tensor("0", [1], [1], "LongStorage") + b"u.")
    put(t, "expanded", head + pickled("n") + tensor("0", [100000, 100000], [0, 0]) + b"u.")
    put(t, "negative", head + pickled("n") + tensor("0", [-1], [1], offset=-1) + b"u.")
    put(t, "short", b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n)Rs.")
    put(t, "code", b"\x80\x02cos\nsystem\nX\2\0\0\0id\x85R.")
    put(t, "laughs", b"\x80\x02)" + b"".join(b"q\0h\0h\0\x86" for _ in range(60)) + b".")
    put(t, "itself", b"\x80\x02]q\0h\0a.")
    put(t, "length", b"\x80\x02X\xff\xff\xff\xffabc")
    put(t, "long", b"\x80\x02\x8a\xff" + bytes(255) + b".")
    put(t, "framed", b"\x80\x04\x95" + struct.pack("<Q", 9) + b"}\x94\x8c\1a\x94K\1s.")


if __name__ == "__main__":
    shutil.rmtree(ROOT, ignore_errors=True)
    for make in [safetensors, configs, datasets, protocol, texts, grammars, ggufs, pickles]:
        make()
    print(sum(1 for f in ROOT.rglob("*") if f.is_file()), "inputs,",
          sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file()), "bytes")
