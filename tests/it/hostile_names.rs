//! Names that look like others, deltas that all ask for at once, and texts that are odd.

use deltaserve::grpc::proto;
use tonic::Code;

use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn names_that_look_alike_are_different_names_and_none_means_the_base() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let base = client.text("", "once upon", 24).await;
    let names = ["style", "Style", "STYLE", "style.", "style-", "style_", "default", "base", "deltaserve"];
    let mut stored = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let id = client.upload(name, &world.delta(i as u64 + 1)).await.expect("an upload").id;
        stored.push((id, client.text(name, "once upon", 24).await));
    }
    for (name, (id, text)) in names.iter().zip(&stored) {
        let said = client.generate(ask(name, "once upon", 24)).await.expect("it generates");
        let by = said.finished.served_by.expect("who served it");
        assert_eq!((by.name.as_str(), &by.id, &said.text), (*name, id, text));
    }
    let ids: std::collections::BTreeSet<&String> = stored.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), names.len(), "each has its own version");
    assert_eq!(client.text("", "once upon", 24).await, base);
    // letters of other scripts and other forms of the same letter, and names that are written otherwise in addresses
    for name in ["st\u{443}le", "style\u{301}", "ｓｔｙｌｅ", "st%79le", "style\u{200b}", "st\u{200d}yle", "style\0"]
    {
        let refused = client.upload(name, &world.delta(1)).await.expect_err(name);
        expect_invalid(&refused, "name", &[]);
        let unknown = client.generate(ask(name, "x", 1)).await.expect_err(name);
        assert!(matches!(unknown.code(), Code::InvalidArgument | Code::NotFound), "{unknown:?}");
    }
    assert_eq!(client.list().await.len(), names.len());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_delta_that_a_hundred_ask_for_at_once_answers_all_the_same() {
    let world = World::new();
    let running = world.start().await;
    running.client.upload("style", &world.delta(1)).await.expect("an upload");
    let said = running.client.text("style", "once upon", 8).await;
    running.stop().await;

    let running = world.start().await; // nothing is resident
    let client = &running.client;
    let mut answered = 0;
    while answered < 100 {
        let work = (0..50).map(|_| client.generate(ask("style", "once upon", 8)));
        for found in timely("all end", futures::future::join_all(work)).await {
            match found {
                Ok(found) => {
                    assert_eq!(found.text, said);
                    answered += 1;
                }
                Err(full) => assert_eq!(full.code(), Code::ResourceExhausted, "{full:?}"),
            }
        }
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_nobody_knows_are_answered_alike_however_many() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let not_found = (Code::NotFound, "DELTA_NOT_FOUND".to_owned());
    for batch in 0..20 {
        let work = (0..50).map(|i| client.tenant(&format!("t{batch}")).delta_error(format!("nobody-{batch}-{i}")));
        for found in timely("all end", futures::future::join_all(work)).await {
            assert_eq!(kind(&found), not_found);
        }
    }
    assert_eq!(client.generate(ask("", "hello", 4)).await.expect("it still answers").ids.len(), 4);
    running.stop().await;
}

impl Client {
    /// The refusal of a request for a delta that there is none of.
    async fn delta_error(self, name: String) -> tonic::Status {
        self.generate(ask(&name, "x", 1)).await.expect_err("unknown")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_texts_are_answered_or_refused_soon() {
    let world = World::new();
    let running = world.start().await;
    let client = &running.client;
    let marks = format!("a{}", "\u{301}".repeat(1_000_000));
    let texts = [
        "\0",
        " ",
        "\n\n",
        "\u{202e}abc\u{202c}",
        "\u{feff}a",
        "\u{fffd}",
        "</s><s>",
        "[INST]",
        "a\u{fffe}0\u{fffe}",
        &marks,
    ];
    for text in texts {
        match client.generate(ask("", text, 4)).await {
            Ok(said) => assert_eq!(said.ids.len(), 4),
            Err(refused) => assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}"),
        }
        let request = proto::TokenizeRequest { text: text.into(), add_special_tokens: Some(false) };
        let found = client.inference().tokenize(client.request(request)).await.expect("any text").into_inner();
        // the special tokens of the base are the first three
        assert!(found.ids.iter().all(|id| *id > 2), "a user's text is no special token: {:.40}", text);
    }
    for ids in [vec![128], vec![u32::MAX], vec![3, 4, 1 << 31]] {
        let bad = proto::prompt::Prompt::Tokens(proto::TokenIds { ids });
        let request = proto::GenerateRequest { prompt: Some(proto::Prompt { prompt: Some(bad) }), ..ask("", "", 4) };
        expect_invalid(&client.generate(request).await.expect_err("no such token"), "prompt.tokens", &[]);
    }
    running.stop().await;
}
