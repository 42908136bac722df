//! Flags: what is accepted, and every problem by its flag.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: ServeArgs,
}

fn config(flags: &[&str]) -> Result<Config, ConfigError> {
    let line = ["serve"].iter().chain(flags);
    Config::try_from(Line::try_parse_from(line).expect("flags parse").args)
}

#[test]
fn the_defaults_are_valid() -> Result<(), ConfigError> {
    let config = config(&["--base", "models/x"])?;
    assert_eq!(config.base.device, DeviceChoice::Cpu);
    assert_eq!(config.grpc.max_message_bytes, 16 << 20);
    assert!(config.http.is_some());
    assert!(config.engine.prefix_cache);
    assert_eq!((config.engine.constraint_bytes, config.delta_retry), (512 << 20, Duration::from_secs(5)));
    assert_eq!(config.engine.speculative_ngram, 0, "nobody pays for guesses who did not ask for them");
    assert_eq!(config.train.share, 1, "a job's bits do not depend on its company unless that is asked for");
    Ok(())
}

#[test]
fn all_problems_are_reported_at_once() {
    let flags = [
        "--base=",
        "--database=mysql://user:secret@host/db",
        "--blobs=ftp://host/x",
        "--verify=maybe",
        "--listen=nowhere",
        "--http=9090",
        "--device=tpu",
        "--dtype=f16",
        "--threads=0",
        "--max-sequences=64",
        "--max-batch-tokens=8",
        "--max-message-mb=4096",
        "--log=a=b=c",
        "--max-queue=0",
        "--delta-retry-seconds=3601",
        "--max-constraint-mb=1",
        "--speculative-ngram=17",
        "--train-share=9",
        "--train-floor=80",
        "--train-max-slowdown=10.5",
        "--train-nice=20",
        "--bf16x2=on",
        "--activations=int4",
        "--tenant-max-concurrent=0",
        "--tenant-rate=fast",
        "--tenant-weight=a=0",
        "--tenant-weight=../x=2",
    ];
    let ConfigError(problems) = config(&flags).expect_err("nearly everything is wrong");
    let expected = [
        "--base",
        "--database",
        "--blobs",
        "--verify",
        "--listen",
        "--http",
        "--device",
        "--dtype",
        "--threads",
        "--max-batch-tokens",
        "--max-message-mb",
        "--log",
        "--max-queue",
        "--delta-retry-seconds",
        "--max-constraint-mb",
        "--speculative-ngram",
        "--train-share",
        "--train-floor",
        "--train-max-slowdown",
        "--train-nice",
        "--bf16x2",
        "--activations",
        "--tenant-max-concurrent",
        "--tenant-rate",
        "--tenant-weight",
        "--tenant-weight",
    ];
    for flag in expected {
        assert!(problems.iter().any(|p| p.starts_with(&format!("{flag}:"))), "{flag} is not in {problems:?}");
    }
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    assert!(!problems.concat().contains("secret"), "a database's URL is not repeated: {problems:?}");
}

#[test]
fn a_databases_password_is_not_in_what_is_logged() -> Result<(), ConfigError> {
    let config = config(&["--base=x", "--database=postgres://user:secret@host/db", "--blobs=s3://bucket/prefix"])?;
    assert!(!format!("{config:?}").contains("secret"));
    assert_eq!(config.places().blobs.as_deref(), Some("s3://bucket/prefix"));
    Ok(())
}

#[test]
fn the_slowdown_is_a_share() {
    let bound = |flags: &[&str]| config(&[&["--base=x"], flags].concat()).map(|c| c.train.max_slowdown);
    assert_eq!(bound(&[]), Ok(0.1));
    assert_eq!([bound(&["--train-max-slowdown=0"]), bound(&["--train-max-slowdown=0.25"])], [Ok(0.0), Ok(0.25)]);
    for bad in ["-0.1", "nan", "inf", "11"] {
        let problems = bound(&[&format!("--train-max-slowdown={bad}")]).expect_err(bad).0;
        assert!(problems.len() == 1 && problems[0].contains("0.1 for 10 %"), "{problems:?}");
    }
}

#[test]
fn a_format_of_fewer_bits_is_named_as_it_is_accepted() {
    let quantize =
        |value: &str| Line::try_parse_from(["serve", "--base=x", "--quantize", value]).map(|l| l.args.quantize);
    assert_eq!(quantize("q8_0").ok(), Some(Some(QuantizeChoice::Q8_0)));
    assert_eq!(quantize("q4k").ok(), Some(Some(QuantizeChoice::Q4K)));
    let refused = quantize("q2").err().map(|e| e.to_string()).unwrap_or_default();
    assert!(refused.contains("--quantize") && refused.contains("q8_0, q4k"), "{refused}");
}

#[test]
fn what_products_take_of_their_input_is_said_in_words() {
    let activations = |flags: &[&str]| config(&[&["--base=x"], flags].concat()).map(|c| c.engine.activations);
    assert_eq!(activations(&[]), Ok(Activations::AsWeights));
    assert_eq!(activations(&["--activations=f32"]), Ok(Activations::F32));
    assert_eq!(activations(&["--dtype=bf16", "--activations=weights"]), Ok(Activations::AsWeights));
    let refused = |flags: &[&str]| activations(flags).map_err(|e| e.0.join("; ")).unwrap_err();
    assert!(refused(&["--activations=bf16"]).contains("accepted are \"weights\" and \"f32\""));
    assert!(refused(&["--dtype=bf16", "--quantize=q8_0"]).starts_with("--quantize:"));
    let f16 = refused(&["--dtype=f16"]);
    assert!(f16.contains("f32 and bf16"), "{f16}");
}

#[test]
fn the_prefix_cache_is_on_or_off() {
    let on = |value| config(&["--base=x", value]).map(|c| c.engine.prefix_cache);
    assert_eq!(on("--prefix-cache=on"), Ok(true));
    assert_eq!(on("--prefix-cache=off"), Ok(false));
    assert!(Line::try_parse_from(["serve", "--base=x", "--prefix-cache=maybe"]).is_err());
}

#[test]
fn http_can_be_off_and_never_shares_the_address() {
    assert!(config(&["--base=x", "--http=off"]).is_ok_and(|c| c.http.is_none()));
    assert!(config(&["--base=x", "--http=127.0.0.1:50051"]).is_err());
}

#[test]
fn limits_of_tenants_are_off_unless_given() {
    let tenants = |flags: &[&str]| config(&[&["--base=x"], flags].concat()).map(|c| c.tenants);
    assert_eq!(tenants(&[]), Ok(TenantConfig::default()));
    let given = ["--tenant-max-concurrent=8", "--tenant-rate=2.5:10", "--tenant-weight=gold=4,silver=2"];
    let names = |weights: &[(&str, u32)]| weights.iter().map(|(n, w)| (TenantId::new(n).unwrap(), *w)).collect();
    let weights = names(&[("gold", 4), ("silver", 2)]);
    assert_eq!(
        tenants(&given),
        Ok(TenantConfig { max_concurrent: Some(8), rate: Some((2.5, 10)), weights, ..TenantConfig::default() })
    );
    let given =
        ["--tenant-token-rate=1e8", "--tenant-max-deltas=0", "--tenant-max-stored-mb=3", "--tenant-limits=l.json"];
    let expected = TenantConfig {
        tokens: Some((1e8, 100_000_000)),
        max_deltas: Some(0),
        max_stored_bytes: Some(3 << 20),
        file: Some("l.json".into()),
        ..TenantConfig::default()
    };
    assert_eq!(tenants(&given), Ok(expected));
    let problems = tenants(&["--tenant-token-rate=1e10"]).expect_err("too much").0;
    assert!(
        problems[0].starts_with("--tenant-token-rate:") && problems[0].contains("tokens per second"),
        "{problems:?}"
    );
    // without a burst, as many at once as come in a second, and one at least
    let rate = |value: &str| tenants(&[&format!("--tenant-rate={value}")]).map(|t| t.rate);
    assert_eq!([rate("20"), rate("0.2"), rate("2.5")], [Ok(Some((20.0, 20))), Ok(Some((0.2, 1))), Ok(Some((2.5, 3)))]);
    for bad in ["0", "1e-20", "-1", "nan", "inf", "1e9", "2:0", "2:x", "2:3:4", ""] {
        let problems = rate(bad).expect_err(bad).0;
        assert!(problems[0].starts_with("--tenant-rate:") && problems[0].contains("R[:BURST]"), "{problems:?}");
    }
    for bad in ["gold", "gold=", "gold=x", "gold=1001", "=3", "a=2,a=3"] {
        let problems = tenants(&[&format!("--tenant-weight={bad}")]).expect_err(bad).0;
        assert!(problems[0].starts_with("--tenant-weight:"), "{problems:?}");
    }
}
