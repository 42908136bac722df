//! What the requests of a run are: everything that is settled before the first is sent.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, bail};
use rand::{Rng, distr::weighted::WeightedIndex, rngs::StdRng};
use rand_distr::Distribution;

use super::{
    call::Call,
    options::{BenchArgs, Load},
    targets::{self, Target},
    texts::{self, Pieces, Row},
    workload::{Choice, Lengths, Op, Stream, generator, generator_of_load},
};
use crate::{
    cli::{Common, client::Client, output},
    grpc::{DEFAULT_TENANT, proto},
};

/// Calls of a connection, so that its limit on streams is not what is measured.
const CALLS_PER_CONNECTION: usize = 128;
const MAX_CONNECTIONS: usize = 64;
/// Tenants of one run.
const MAX_TENANTS: usize = 256;

/// Where texts come from.
#[derive(Debug)]
enum Source {
    /// One for all.
    Text(String),
    /// In turn.
    Rows(Vec<Row>),
    /// Made up, of drawn lengths.
    Made(Lengths),
}

/// A request that is to be sent.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) call: Call,
    /// Its delta, by rank.
    pub(super) target: Option<usize>,
    /// Whose request it is, by place in the plan's list.
    pub(super) tenant: usize,
}

/// What a run's requests are made of.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) tenants: Vec<String>,
    /// The first tenant's, over each connection.
    connections: Vec<Client>,
    /// By connection, then by tenant.
    clients: Vec<Vec<Client>>,
    pub(super) targets: Vec<Target>,
    pub(super) info: proto::GetServerInfoResponse,
    maker: Maker,
}

/// Makes requests; knows no server.
#[derive(Debug)]
struct Maker {
    seed: u64,
    /// Tells the made-up prompts of one load from those of others.
    load: AtomicU64,
    tenants: usize,
    /// The tenant of each delta, by rank.
    owners: Vec<usize>,
    /// As requests name them, by rank.
    names: Vec<String>,
    ops: Vec<(Op, Option<Choice>)>,
    weights: WeightedIndex<f64>,
    base_share: f64,
    source: Source,
    output: Lengths,
    vocab: u32,
    pieces: Option<Pieces>,
}

impl Plan {
    /// Connects, looks deltas up, reads files.
    ///
    /// # Errors
    /// A server that cannot be reached; names that are not there; operations that no delta can do; lengths that never fit.
    pub(super) async fn new(common: &Common, args: &BenchArgs, loads: &[Load]) -> anyhow::Result<Self> {
        let named = common.tenant.as_deref().map(tenants).transpose()?;
        let most = loads.iter().map(|load| load.most_in_flight(args.max_in_flight)).max().unwrap_or(1);
        let mut clients = Vec::new();
        for _ in 0..most.div_ceil(CALLS_PER_CONNECTION).clamp(1, MAX_CONNECTIONS) {
            let client = Client::connect(&Common { tenant: None, ..common.clone() }).await?;
            clients.push(match &named {
                Some(tenants) => tenants.iter().map(|t| client.with_tenant(t)).collect::<anyhow::Result<Vec<_>>>()?,
                None => vec![client],
            });
        }
        // unnamed, it is the credentials' own
        let tenants = named.unwrap_or_else(|| vec![DEFAULT_TENANT.to_owned()]);
        let connections: Vec<Client> = clients.iter().filter_map(|of| of.first().cloned()).collect();
        let first = connections.first().context("no connection")?;
        let info = first.server().get_server_info(proto::GetServerInfoRequest {}).await?.into_inner();

        let ops: Vec<Op> = args.op.0.iter().map(|(op, _)| *op).collect();
        let wanted = match &args.delta_prefix {
            Some(prefix) => vec![format!("{prefix}*")],
            None => args.deltas.clone(),
        };
        let whose: Vec<(String, Client)> = tenants.iter().cloned().zip(clients[0].iter().cloned()).collect();
        let targets = targets::resolve(&whose, &wanted, &ops).await?;
        if targets.is_empty() && !wanted.is_empty() {
            let ops: Vec<&str> = ops.iter().map(|op| op.name()).collect();
            bail!("--deltas: none of these deltas can be used by --op {}", ops.join(","));
        }
        let choices = choices(args, &targets)?;

        let source = match (&args.prompt, &args.prompts) {
            (Some(text), _) => Source::Text(text.clone()),
            (None, Some(path)) => Source::Rows(texts::read(path).await?),
            (None, None) => Source::Made(args.prompt_tokens),
        };
        let made_texts = matches!(source, Source::Made(_)) && ops.iter().any(|op| *op != Op::Generate);
        let pieces = match made_texts || ops.contains(&Op::Score) {
            true => Some(pieces(first).await?),
            false => None,
        };
        let base = info.base.clone().unwrap_or_default();
        check_room(args, &source, &ops, &base)?;
        let maker = Maker {
            seed: args.seed,
            load: AtomicU64::new(0),
            tenants: tenants.len(),
            owners: targets.iter().map(|t| tenants.iter().position(|name| *name == t.tenant).unwrap_or(0)).collect(),
            names: targets.iter().map(|t| t.delta.clone()).collect(),
            ops: choices,
            weights: WeightedIndex::new(args.op.0.iter().map(|(_, weight)| *weight)).context("--op")?,
            base_share: args.base_share,
            source,
            output: args.max_new_tokens,
            vocab: base.vocab_size.max(1),
            pieces,
        };
        Ok(Self { tenants, connections, clients, targets, info, maker })
    }

    /// Begins a load: its made-up prompts are those of no other.
    pub(super) fn begin_load(&self) {
        self.maker.load.store(rand::random(), Ordering::Relaxed);
    }

    /// Request `i` of a stream: the same for the same seed, but for made-up prompts, which are as long and otherwise of this load.
    pub(super) fn order(&self, stream: Stream, i: u64) -> Order {
        self.maker.order(stream, i)
    }

    /// The connection of caller or request `i`, as an order's tenant.
    pub(super) fn client(&self, i: u64, tenant: usize) -> Option<&Client> {
        self.clients.get((i % self.clients.len().max(1) as u64) as usize)?.get(tenant)
    }

    /// A client for questions about the server.
    pub(super) fn observer(&self) -> Option<&Client> {
        self.connections.first()
    }

    /// The kinds of the deltas, each once and sorted, and the place of each delta's kind, by rank.
    pub(super) fn kinds(&self) -> (Vec<String>, Vec<usize>) {
        let mut kinds: Vec<String> = self.targets.iter().map(|t| t.kind.clone()).collect();
        kinds.sort();
        kinds.dedup();
        let places = self.targets.iter().map(|t| kinds.binary_search(&t.kind).unwrap_or(0)).collect();
        (kinds, places)
    }
}

/// Tenants of `--tenant`, separated by commas.
fn tenants(list: &str) -> anyhow::Result<Vec<String>> {
    let mut tenants: Vec<String> = Vec::new();
    for name in list.split(',').map(str::trim) {
        if name.is_empty() {
            bail!("--tenant {list:?} has an empty name");
        }
        if !tenants.iter().any(|t| t == name) {
            tenants.push(name.to_owned());
        }
    }
    if tenants.len() > MAX_TENANTS {
        bail!("--tenant names {} tenants; at most {MAX_TENANTS} make a run", tenants.len());
    }
    Ok(tenants)
}

/// For each operation, how its delta is drawn.
fn choices(args: &BenchArgs, targets: &[Target]) -> anyhow::Result<Vec<(Op, Option<Choice>)>> {
    let one = |(op, _): &(Op, f64)| {
        let ranks: Vec<usize> = (0..targets.len()).filter(|&rank| targets[rank].can(*op)).collect();
        let choice = Choice::new(args.popularity, args.zipf_s, ranks);
        if choice.is_none() && !targets.is_empty() {
            bail!("--op {}: none of the deltas can {}", op.name(), op.name());
        }
        Ok((*op, choice))
    };
    args.op.0.iter().map(one).collect()
}

async fn pieces(client: &Client) -> anyhow::Result<Pieces> {
    let pieces = Pieces::find(async |text: String| {
        let request = proto::TokenizeRequest { text, ..Default::default() };
        anyhow::Ok(client.inference().tokenize(request).await?.into_inner().ids.len())
    });
    let pieces = pieces.await?;
    if !pieces.exact {
        output::note("this base's tokenizer does not go by words or letters: lengths of made-up texts are approximate");
    }
    Ok(pieces)
}

/// Refuses lengths that never fit; what a delta adds is the server's to say.
fn check_room(args: &BenchArgs, source: &Source, ops: &[Op], base: &proto::BaseInfo) -> anyhow::Result<()> {
    let Source::Made(prompt) = source else { return Ok(()) };
    // of an encoder-decoder prompt and output do not share the context
    let apart = base.family == "t5";
    let together = ops.iter().any(|op| matches!(op, Op::Generate | Op::Score)) && !apart;
    let output = if together { args.max_new_tokens.most() } else { 0 };
    let most = u64::from(prompt.most()) + u64::from(output);
    if base.context_length > 0 && most > u64::from(base.context_length) {
        bail!(
            "--prompt-tokens {prompt} and --max-new-tokens {}: up to {most} tokens, but the base's context has {}",
            args.max_new_tokens,
            base.context_length
        );
    }
    Ok(())
}

impl Maker {
    fn order(&self, stream: Stream, i: u64) -> Order {
        let rng = &mut generator(self.seed, stream, i);
        let (op, choice) = &self.ops[self.weights.sample(rng)];
        // always drawn, so that a share changes which requests name deltas and nothing else
        let bare = rng.random::<f64>() < self.base_share && *op != Op::Classify;
        let target = choice.as_ref().map(|choice| choice.draw(i, rng)).filter(|_| !bare);
        let anybody = rng.random_range(0..self.tenants);
        let tenant = target.and_then(|rank| self.owners.get(rank).copied()).unwrap_or(anybody);
        let delta = target.and_then(|rank| self.names.get(rank).cloned()).unwrap_or_default();
        let new = self.output.draw(rng);
        let words = &mut generator_of_load(self.seed, stream, i, self.load.load(Ordering::Relaxed));
        Order { call: self.call(*op, delta, new, (i, rng, words)), target, tenant }
    }

    /// `rng` is the request's, `words` that of its made-up texts.
    fn call(&self, op: Op, delta: String, new: u32, (i, rng, words): (u64, &mut StdRng, &mut StdRng)) -> Call {
        match op {
            Op::Generate => {
                let options =
                    proto::GenerateOptions { max_new_tokens: Some(new), ignore_eos: true, ..Default::default() };
                let prompt = proto::Prompt { prompt: Some(self.prompt(i, rng, words)) };
                let (prompt, options) = (Some(prompt), Some(options));
                Call::Generate(Box::new(proto::GenerateRequest { delta, prompt, options, ..Default::default() }))
            }
            Op::Classify => {
                let input = proto::ClassifyInput { text: self.text(i, rng, words), ..Default::default() };
                Call::Classify(proto::ClassifyRequest { delta, inputs: vec![input], ..Default::default() })
            }
            Op::Embed => {
                Call::Embed(proto::EmbedRequest { delta, inputs: vec![self.text(i, rng, words)], ..Default::default() })
            }
            Op::Score => {
                let prompt = self.text(i, rng, words);
                let given = match &self.source {
                    Source::Rows(rows) => rows[(i % rows.len() as u64) as usize].completion.clone(),
                    _ => None,
                };
                let made = || self.pieces.as_ref().map(|p| p.continuation(new as usize, words)).unwrap_or_default();
                let completion = given.unwrap_or_else(made);
                let input = proto::ScoreInput { prompt, completion };
                Call::Score(proto::ScoreRequest { delta, inputs: vec![input], ..Default::default() })
            }
        }
    }

    /// A prompt; made-up ones are ids, which are exactly as many as drawn.
    fn prompt(&self, i: u64, rng: &mut StdRng, words: &mut StdRng) -> proto::prompt::Prompt {
        use proto::prompt::Prompt;
        match &self.source {
            Source::Made(lengths) => {
                let ids = (0..lengths.draw(rng)).map(|_| words.random_range(0..self.vocab)).collect();
                Prompt::Tokens(proto::TokenIds { ids })
            }
            Source::Text(_) | Source::Rows(_) => Prompt::Text(self.text(i, rng, words)),
        }
    }

    fn text(&self, i: u64, rng: &mut StdRng, words: &mut StdRng) -> String {
        match &self.source {
            Source::Text(text) => text.clone(),
            Source::Rows(rows) => rows[(i % rows.len() as u64) as usize].prompt.clone(),
            Source::Made(lengths) => {
                let tokens = lengths.draw(rng) as usize;
                self.pieces.as_ref().map(|p| p.text(tokens, words)).unwrap_or_default()
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::bench::options::tests::parse;

    fn target(tenant: &str, delta: &str, task: &str) -> Target {
        let kind = "lora".to_owned();
        Target { tenant: tenant.into(), delta: delta.into(), kind, task: task.into(), parameters: 1 }
    }

    async fn maker(words: &[&str], targets: &[Target]) -> anyhow::Result<Maker> {
        let args = parse(words).map_err(anyhow::Error::msg)?;
        let pieces = Pieces::find(async |text: String| anyhow::Ok(text.split_whitespace().count())).await?;
        Ok(Maker {
            seed: args.seed,
            load: AtomicU64::new(0),
            tenants: 2,
            owners: targets.iter().map(|t| usize::from(t.tenant == "b")).collect(),
            names: targets.iter().map(|t| t.delta.clone()).collect(),
            ops: choices(&args, targets)?,
            weights: WeightedIndex::new(args.op.0.iter().map(|(_, weight)| *weight))?,
            base_share: args.base_share,
            source: Source::Made(args.prompt_tokens),
            output: args.max_new_tokens,
            vocab: 50,
            pieces: Some(pieces),
        })
    }

    /// Requests for the bare base of a server.
    pub(in crate::cli::bench) async fn of_base(words: &[&str], client: Client) -> anyhow::Result<Plan> {
        let maker = Maker { tenants: 1, ..maker(words, &[]).await? };
        let (connections, clients) = (vec![client.clone()], vec![vec![client]]);
        Ok(Plan { tenants: vec!["a".into()], connections, clients, targets: vec![], info: Default::default(), maker })
    }

    #[tokio::test]
    async fn requests_follow_from_the_seed_and_their_number() {
        let targets = [target("a", "x", "causal_lm"), target("b", "y", "causal_lm"), target("a", "c", "seq_cls")];
        let words = ["--op", "generate=2,classify=1,score=1", "--deltas", "x,y,c", "--base-share", "0.25"];
        let words = [&words[..], &["--prompt-tokens", "3..9", "-m", "2..5"]].concat();
        let made = maker(&words, &targets).await.expect("a plan");
        let again = maker(&words, &targets).await.expect("a plan");
        let other = maker(&[&words[..], &["--seed", "1"]].concat(), &targets).await.expect("a plan");
        let show = |m: &Maker, stream, i| format!("{:?}", m.order(stream, i));
        assert!((0..50).all(|i| show(&made, Stream::Counted, i) == show(&again, Stream::Counted, i)));
        let same = (0..50).filter(|&i| show(&made, Stream::Counted, i) == show(&other, Stream::Counted, i)).count();
        assert!(same < 5, "{same}");
        let (mut bare, mut counts) = (0, [0; 4]);
        for i in 0..4_000 {
            let order = made.order(Stream::Counted, i);
            let rank = order.target;
            match &order.call {
                Call::Generate(r) => {
                    counts[0] += 1;
                    bare += usize::from(rank.is_none());
                    assert_eq!(r.delta, rank.map_or("", |rank| ["x", "y"][rank]));
                    let Some(proto::prompt::Prompt::Tokens(ids)) = r.prompt.clone().and_then(|p| p.prompt) else {
                        panic!("{r:?}")
                    };
                    assert!((3..=9).contains(&ids.ids.len()) && ids.ids.iter().all(|id| *id < 50));
                    let new = r.options.as_ref().and_then(|o| o.max_new_tokens).expect("a number");
                    assert!((2..=5).contains(&new));
                }
                Call::Classify(r) => {
                    counts[1] += 1;
                    assert_eq!((r.delta.as_str(), rank, order.tenant), ("c", Some(2), 0));
                    assert!((3..=9).contains(&r.inputs[0].text.split_whitespace().count()));
                }
                Call::Score(r) => {
                    counts[2] += 1;
                    assert!((2..=5).contains(&r.inputs[0].completion.split_whitespace().count()));
                }
                Call::Embed(_) => counts[3] += 1,
            }
            if let Some(rank) = rank {
                assert_eq!(order.tenant, [0, 1, 0][rank]);
            }
        }
        assert!((1_850..2_150).contains(&counts[0]) && counts[3] == 0, "{counts:?}");
        assert!((880..1_120).contains(&counts[1]) && (880..1_120).contains(&counts[2]), "{counts:?}");
        assert!((420..580).contains(&bare), "{bare}");
    }

    #[tokio::test]
    async fn an_operation_without_a_delta_that_can_do_it_is_named() {
        let targets = [target("a", "x", "causal_lm")];
        let refused = maker(&["--op", "generate,classify", "--deltas", "x"], &targets).await;
        assert!(refused.expect_err("it must be refused").to_string().contains("--op classify"));
        // without deltas the base is asked, whatever it can do
        let bare = maker(&["--op", "classify"], &[]).await.expect("a plan");
        assert!((0..20).all(|i| bare.order(Stream::Counted, i).target.is_none()));
    }

    #[test]
    fn lengths_that_never_fit_and_empty_tenants_are_refused() {
        let check = |words: &[&str], family: &str| {
            let args = parse(words).expect("it parses");
            let base = proto::BaseInfo { context_length: 100, family: family.into(), ..Default::default() };
            let ops: Vec<Op> = args.op.0.iter().map(|(op, _)| *op).collect();
            check_room(&args, &Source::Made(args.prompt_tokens), &ops, &base)
        };
        assert!(check(&["--prompt-tokens", "60", "-m", "40"], "llama").is_ok());
        let error = check(&["--prompt-tokens", "10..60", "-m", "41"], "llama").expect_err("too long").to_string();
        assert!(error.contains("101 tokens") && error.contains("has 100"), "{error}");
        assert!(check(&["--prompt-tokens", "100", "-m", "41", "--op", "embed"], "bert").is_ok());
        assert!(check(&["--prompt-tokens", "100", "-m", "41"], "t5").is_ok());
        assert_eq!(tenants("a, b,a").expect("tenants"), ["a", "b"]);
        assert!(tenants("a,,b").is_err());
    }
}
