"""Makes the cases of beam search: what transformers' generate says for models whose logits depend on the last token and the length."""
import torch, transformers
from transformers import GenerationMixin, PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput
V = 10
class Config(PretrainedConfig):
    model_type = "table"
class Table(PreTrainedModel, GenerationMixin):
    config_class = Config
    def __init__(self, config, table):
        super().__init__(config)
        self.by_length = by_length
        self.table = torch.nn.Parameter(table)
        self.post_init()
    def prepare_inputs_for_generation(self, input_ids, **kw): return {"input_ids": input_ids}
    def forward(self, input_ids, **kw): return CausalLMOutput(logits=self.table[input_ids] + self.by_length[: input_ids.shape[1]])
gen = torch.Generator().manual_seed(5)
by_length = (torch.randn(14, V, generator=gen) * 1e4).round() / 1e4
tables, cases = [], []
for t in range(4):
    table = 1.5 * torch.randn(V, V, generator=gen)
    table[:, 1] += [0.5, -1.0, 1.5, 0.0][t]
    tables.append((table * 1e4).round() / 1e4)
    m = Table(Config(vocab_size=V), tables[-1]).eval()
    for beams, penalty, early, new in [(2,1.0,False,8),(3,0.0,False,8),(4,1.0,True,12),(3,2.0,"never",10),(5,0.6,False,12),(3,-1.0,True,6),(4,1.5,True,9),(2,1.0,"never",12),(1,1.0,False,5)]:
        if beams == 1: continue
        for start in (0, 3):
            out = m.generate(torch.tensor([[start]]), num_beams=beams, num_return_sequences=beams, length_penalty=penalty, early_stopping=early,
                max_new_tokens=new, do_sample=False, eos_token_id=1, pad_token_id=0, return_dict_in_generate=True, output_scores=True, use_cache=False)
            seqs = []
            for s in out.sequences[:, 1:].tolist():
                seqs.append(s[: s.index(1) + 1] if 1 in s else s[:new])
            cases.append((t, start, beams, penalty, [False, True, "never"].index(early), new, seqs, out.sequences_scores.tolist()))
f = lambda x: repr(round(float(x), 6))
with open("cases.rs", "w") as o:
    o.write(f"const V: usize = {V};\n#[derive(Debug)]\nstruct Case {{ table: usize, start: u32, beams: usize, penalty: f32, early: usize, max_new: usize, tokens: &'static [&'static [u32]], scores: &'static [f32] }}\n")
    o.write(f"const TABLES: [[[f32; V]; V]; {len(tables)}] = {[[[float(f(x)) for x in r] for r in t.tolist()] for t in tables]};\n")
    o.write(f"const BY_LENGTH: [[f32; V]; 14] = {[[float(f(x)) for x in r] for r in by_length.tolist()]};\n")
    o.write("const CASES: &[Case] = &[\n")
    for t, s, b, p, e, n, q, sc in cases:
        o.write(f"Case {{ table: {t}, start: {s}, beams: {b}, penalty: {f(p)}, early: {e}, max_new: {n}, tokens: &[{', '.join('&' + str(x) for x in q)}], scores: &[{', '.join(f(x) for x in sc)}] }},\n")
    o.write("];\n")
print(len(cases))
