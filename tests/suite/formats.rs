//! Files of rows in every format, what their columns say, conversations, masks by role, packing.

use std::path::Path;

use serde_json::{Value, json};
use tunebook::data::{
    Batch, ChatTemplate, DataConfig, Dataset, Example, IGNORE_INDEX, RowFile, RowFormat, Rows, Tokenizer, TrainOn,
    detect, encode, message,
};

use crate::support::{golden, shared};
use crate::tiny_tokenizer::{CHAT_TEMPLATE, tiny_tokenizer, tokenizer_json};

fn file(suffix: &str, text: impl AsRef<[u8]>) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(suffix).tempfile().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn values(rows: &Rows) -> Vec<Value> {
    (0..rows.len()).map(|i| Value::Object(rows.get(i).unwrap().clone())).collect()
}

#[test]
fn the_same_rows_come_from_every_format() {
    let expected =
        [json!({"q": "a, \"b\"", "a": "two\nlines"}), json!({"q": "", "a": "é"}), json!({"q": "x", "a": "3"})];
    let jsonl: String = expected.iter().map(|v| format!("{v}\n")).collect();
    let csv = "\u{FEFF}q,a\n\"a, \"\"b\"\"\",\"two\nlines\"\n,é\r\nx,3\n";
    let tsv = "q\ta\n\"a, \"\"b\"\"\"\t\"two\nlines\"\n\té\nx\t3";
    let list = json!(expected).to_string();
    let nested = json!({"version": 1, "data": expected, "tags": ["a"]}).to_string();
    for (suffix, text, place) in [
        (".jsonl", jsonl.as_str(), ":2"),
        (".ndjson", &jsonl, ":2"),
        (".json", &list, ": row 2"),
        (".JSON", &nested, ": row 2"),
        (".csv", csv, ":4"),
        (".tsv", tsv, ":4"),
    ] {
        let f = file(suffix, text);
        let rows = Rows::from_path(f.path()).unwrap();
        assert_eq!(values(&rows), expected, "{suffix}");
        assert!(rows.place(1).ends_with(place), "{suffix}: {}", rows.place(1));
        let look = RowFile::open(f.path()).unwrap();
        assert_eq!(look.columns(), ["q", "a"], "{suffix}");
        let part = look.clone().select(&["a"]).slice(1, 1).read().unwrap();
        assert_eq!(values(&part), [json!({"a": "é"})], "{suffix}");
        assert!(part.place(0).ends_with(place), "{suffix}: {}", part.place(0));
        let e = look.select(&["b"]).read().unwrap_err().to_string();
        assert!(e.contains("no column `b`"), "{e}");
    }
    for name in ["rows", "rows.txt", "rows.jsonl.gz"] {
        assert!(RowFormat::of(name).unwrap_err().to_string().contains(".parquet"), "{name}");
    }
}

/// tests/golden/scripts/make_parquet.py
#[test]
fn parquet_in_every_compression() {
    for codec in ["none", "snappy", "gzip", "brotli", "zstd", "lz4"] {
        let path = golden(&format!("parquet/{codec}.parquet"));
        let rows = Rows::from_path(&path).unwrap();
        let expected: Vec<Value> = (0..40)
            .map(|i| {
                json!({
                    "id": i, "text": format!("row {i}: ") + &"the cat likes honey. ".repeat(i % 4),
                    "score": if i % 5 == 0 { Value::Null } else { json!(i as f64 / 8.0) },
                    "messages": [message("user", &format!("question {i}")), message("assistant", &format!("answer {i}, with ü and 猫"))],
                })
            })
            .collect();
        assert_eq!(values(&rows), expected, "{codec}");
        // Across the border of two row groups.
        let part = RowFile::open(&path).unwrap().select(&["text"]).slice(14, 4).read().unwrap();
        assert_eq!((part.len(), part.text(3, "text").unwrap()), (4, rows.text(17, "text").unwrap()), "{codec}");
    }
}

#[test]
fn real_files_of_all_formats_agree() {
    let Some(dir) = shared("real/data") else { return };
    let read = |name: &str| Rows::from_path(dir.join(name)).unwrap();
    let jsonl = read("dolly_1000.jsonl");
    let parquet = read("dolly_1000.parquet");
    assert_eq!(values(&parquet), values(&jsonl));
    for name in ["dolly_100_none.parquet", "dolly_100_gzip.parquet", "dolly_100_zstd.parquet"] {
        assert_eq!(values(&read(name)), values(&jsonl.head(100)), "{name}");
    }
    // CSV has text alone.
    let csv = read("dolly_50.csv");
    for (i, row) in values(&csv).iter().enumerate() {
        for (column, value) in row.as_object().unwrap() {
            assert_eq!(value.as_str().unwrap(), jsonl.text(i, column).unwrap(), "row {i}");
        }
    }
    let look = RowFile::open(dir.join("dolly_1000.parquet")).unwrap();
    assert_eq!((look.rows(), look.format()), (Some(1000), RowFormat::Parquet));
    assert_eq!(look.columns(), jsonl.columns());
    let part = look.select(&["response"]).slice(35, 40).read().unwrap();
    assert_eq!(part.columns(), ["response"]);
    assert_eq!((part.len(), part.text(0, "response").unwrap()), (40, jsonl.text(35, "response").unwrap()));
    assert!(part.place(0).ends_with("parquet: row 36"), "{}", part.place(0));
    assert_eq!(read("fastchat_sharegpt_300.json").len(), 300);
}

#[test]
fn conversations_of_sharegpt_are_those_with_roles() {
    let Some(dir) = shared("real/data") else { return };
    let t = tiny_tokenizer();
    let roles = Rows::from_path(dir.join("fastchat_messages_300.jsonl")).unwrap();
    let sharegpt = Rows::from_path(dir.join("fastchat_sharegpt_300.json")).unwrap();
    let (a, b) = (detect(&roles, &t).unwrap(), detect(&sharegpt, &t).unwrap());
    assert!(a.reason.contains("`messages`") && b.reason.contains("`conversations`"), "{a:?} {b:?}");
    let encoded = |rows: &Rows, config: &DataConfig| encode(rows, &t, config).unwrap().fingerprint();
    assert_eq!(encoded(&roles, &a.config), encoded(&sharegpt, &b.config));
}

#[test]
fn conversations_are_understood_in_all_their_forms() {
    let t = tiny_tokenizer();
    let roles = json!([message("system", "x"), message("user", "the"), message("assistant", "cat")]);
    let sharegpt =
        json!([{"from": "system", "value": "x"}, {"from": "human", "value": "the"}, {"from": "gpt", "value": "cat"}]);
    let padded = json!([
        {"role": "system", "content": "x", "tool_calls": null},
        {"role": "user", "content": "the", "tool_calls": null},
        {"role": "assistant", "content": "cat", "tool_calls": null}
    ]);
    let forms = [roles.clone(), sharegpt, padded, json!(roles.to_string())];
    let rows = Rows::from_values(forms.iter().map(|f| json!({"chat": f})).collect()).unwrap();
    let found = detect(&rows, &t).unwrap();
    let ds = encode(&rows, &t, &found.config).unwrap();
    assert_eq!(ds.len(), 4);
    assert!(ds.examples().iter().all(|e| e == ds.get(0)));
    for (bad, what) in [
        (json!([{"from": "alien", "value": "?"}]), "unknown speaker"),
        (json!([{"content": "?"}]), "no role"),
        (json!("hello"), "not a conversation"),
        (json!(["hello"]), "not a conversation"),
        (json!(3), "not a conversation"),
    ] {
        let rows = Rows::from_values(vec![json!({"chat": roles}), json!({ "chat": bad })]).unwrap();
        let e = encode(&rows, &t, &found.config).unwrap_err();
        assert!(e.to_string().contains(what) && e.place().unwrap().contains("row 2: column `chat`"), "{e}");
    }
}

#[test]
fn the_form_of_rows_is_told_by_their_columns() {
    let t = tiny_tokenizer();
    let of = |row: Value| detect(&Rows::from_values(vec![row]).unwrap(), &t);
    for (row, reason) in [
        (json!({"instruction": "a", "input": "", "output": "b"}), "`instruction` and `output`, `input`"),
        (
            json!({"instruction": "a", "context": "c", "response": "b", "id": 3}),
            "`instruction` and `response`, `context`",
        ),
        (json!({"prompt": "a", "completion": "b"}), "`prompt` and `completion`"),
        (json!({"question": "a", "answer": "b", "text": "c"}), "`question` and `answer`"),
        (json!({"text": "b"}), "column `text`"),
        (
            json!({"conversations": [{"from": "human", "value": "hi"}], "text": ""}),
            "`conversations` holds conversations",
        ),
    ] {
        let found = of(row).unwrap();
        assert!(found.reason.contains(reason), "{found:?}");
        assert!(found.config.train_on == if reason.contains("`text`") { TrainOn::All } else { TrainOn::Completion });
    }
    let e = of(json!({"questions": "a", "answers": "b"})).unwrap_err().to_string();
    assert!(e.contains("columns questions, answers") && e.contains("Rows::rename"), "{e}");
    // Renamed, they are known.
    let rows = Rows::from_values(vec![json!({"questions": "a", "answers": "b", "n": 1})]).unwrap();
    let rows = rows.rename(&[("questions", "question"), ("answers", "answer")]).unwrap();
    assert_eq!(rows.columns(), ["question", "answer", "n"]);
    assert!(detect(&rows, &t).is_ok());
    assert!(rows.rename(&[("question", "n")]).unwrap_err().to_string().contains("`n`"));
    assert!(rows.rename(&[("qestion", "x")]).unwrap_err().to_string().contains("did you mean `question`?"));
    // Conversations need a template.
    let bare = Tokenizer::from_json(&tokenizer_json(), None).unwrap();
    let rows = Rows::from_values(vec![json!({"messages": [message("user", "hi")]})]).unwrap();
    assert!(detect(&rows, &bare).unwrap_err().to_string().contains("no chat template"));
}

#[test]
fn a_split_is_shuffled_and_the_same_everywhere() {
    let rows = Rows::from_values((0..100).map(|i| json!({"text": format!("{i}")})).collect()).unwrap();
    let (train, eval) = rows.split(10, 42).unwrap();
    assert_eq!((train.len(), eval.len()), (90, 10));
    let text = |rows: &Rows| (0..rows.len()).map(|i| rows.text(i, "text").unwrap()).collect::<Vec<_>>();
    let mut all = [text(&train), text(&eval)].concat();
    // A stored experiment must find its split again: these may never change.
    assert_eq!(text(&eval), SPLIT_42, "{:?}", text(&eval));
    assert_eq!(text(&rows.split(10, 42).unwrap().1), text(&eval));
    assert_ne!(text(&rows.split(10, 43).unwrap().1), text(&eval));
    assert!(eval.place(0).contains("row "));
    all.sort_by_key(|t| t.parse::<usize>().unwrap());
    assert_eq!(all, text(&rows));
    assert!(rows.split(0, 1).is_err() && rows.split(100, 1).is_err());
    assert_eq!(Rows::concat(&[train, eval]).unwrap().len(), 100);
    assert!(Rows::concat(&[]).is_err());
}

const SPLIT_42: [&str; 10] = ["78", "0", "45", "12", "8", "80", "36", "62", "67", "37"];

/// The texts that are trained on, one for each run of tokens.
fn trained(ds: &Dataset, i: usize, t: &Tokenizer) -> Vec<String> {
    let e = ds.get(i);
    let runs = e.input_ids.iter().zip(&e.labels).collect::<Vec<_>>();
    let runs = runs.chunk_by(|a, b| (*a.1 == IGNORE_INDEX) == (*b.1 == IGNORE_INDEX));
    let on = runs.filter(|run| *run[0].1 != IGNORE_INDEX).map(|run| run.iter().map(|x| *x.0).collect::<Vec<u32>>());
    on.map(|ids| t.decode_with_special_tokens(&ids).unwrap().trim().to_string()).collect()
}

#[test]
fn a_loss_is_on_the_turns_of_the_chosen_roles() {
    let t = tiny_tokenizer();
    let chat = json!([
        message("user", "hello"),
        message("assistant", "the cat"),
        message("user", "the"),
        message("assistant", "cat")
    ]);
    let rows = Rows::from_values(vec![json!({ "messages": chat })]).unwrap();
    let template = ChatTemplate::from_tokenizer(&t).unwrap();
    let with = |on: TrainOn| encode(&rows, &t, &DataConfig::messages(template.clone()).train_on(on));
    let roles = |names: &[&str]| TrainOn::Roles(names.iter().map(|n| n.to_string()).collect());
    assert_eq!(trained(&with(TrainOn::Completion).unwrap(), 0, &t), ["the cat<|end|>", "cat<|end|>"]);
    assert_eq!(with(roles(&["assistant"])).unwrap().fingerprint(), with(TrainOn::Completion).unwrap().fingerprint());
    assert_eq!(trained(&with(roles(&["user"])).unwrap(), 0, &t), ["hello<|end|>", "the<|end|>"]);
    let both = trained(&with(roles(&["user", "assistant"])).unwrap(), 0, &t).concat();
    assert!(both.contains("hello<|end|>") && both.contains("the cat<|end|>") && !both.contains("<|user|>"), "{both}");
    assert_eq!(
        with(TrainOn::All).unwrap().get(0).trained_tokens(),
        with(TrainOn::All).unwrap().get(0).input_ids.len() - 1
    );
    assert!(with(roles(&["nobody"])).unwrap_err().to_string().contains("nothing to train on"));
    assert!(with(roles(&[])).unwrap_err().to_string().contains("no role"));
    let text = Rows::from_values(vec![json!({"text": "the"})]).unwrap();
    let e = encode(&text, &t, &DataConfig::text("text").train_on(roles(&["user"]))).unwrap_err().to_string();
    assert!(e.contains("only conversations"), "{e}");
    let saved = serde_json::to_string(&DataConfig::messages(template.clone()).train_on(roles(&["user"]))).unwrap();
    assert!(saved.contains(r#""train_on":{"roles":["user"]}"#), "{saved}");
}

#[test]
fn a_tokenizer_may_have_several_chat_templates() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    put("tokenizer.json", &tokenizer_json());
    put(
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "rag"}]}"#,
    );
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    let e = ChatTemplate::from_tokenizer(&t).unwrap_err().to_string();
    assert!(e.contains("tool_use, rag"), "{e}");
    assert_eq!(ChatTemplate::named(&t, "rag").unwrap().source(), "rag");
    assert!(ChatTemplate::named(&t, "rga").unwrap_err().to_string().contains("tool_use, rag"));
    // Files go before the config.
    put("chat_template.jinja", "default");
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    put("additional_chat_templates/rag.jinja", "rag from its file");
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(ChatTemplate::from_tokenizer(&t).unwrap().source(), "default");
    assert_eq!(ChatTemplate::named(&t, "rag").unwrap().source(), "rag from its file");
    assert!(format!("{t:?}").contains("chat templates"), "{t:?}");
}

#[test]
fn the_choice_of_padding_is_explained() {
    let with = |config: Value| Tokenizer::from_json(&tokenizer_json(), Some(&config.to_string())).unwrap().padding();
    let own = with(json!({"eos_token": "</s>", "pad_token": "<|end|>"}));
    assert_eq!((own.token.as_ref().map(|t| t.1), own.is_eos), (Some(5), false));
    let trap = with(json!({"eos_token": "</s>", "pad_token": "</s>"}));
    assert!(trap.is_eos && trap.to_string().contains("never learns to stop"), "{trap}");
    let unk = with(json!({"eos_token": "</s>", "unk_token": "<unk>"}));
    assert_eq!((unk.token.as_ref().map(|t| t.0.as_str()), unk.is_eos), (Some("<unk>"), false));
    let none = with(json!({"eos_token": "</s>"}));
    assert!(none.token.is_none() && none.to_string().contains("never the end of sequence"), "{none}");
    // And the trap does not spring here: the end keeps its label.
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": CHAT_TEMPLATE});
    let t = Tokenizer::from_json(&tokenizer_json(), Some(&config.to_string())).unwrap();
    let rows = Rows::from_values(vec![json!({"text": "the"}), json!({"text": "the cat the cat"})]).unwrap();
    let ds = encode(&rows, &t, &DataConfig::text("text")).unwrap();
    assert!(ds.examples().iter().all(|e| *e.labels.last().unwrap() == 2));
    assert!(Batch::new(&ds, &[0, 1]).labels.iter().filter(|&&l| l == 2).count() == 2);
}

#[test]
fn a_report_says_what_was_cut() {
    let t = tiny_tokenizer();
    let rows =
        Rows::from_values(vec![json!({"text": "the cat the cat"}), json!({"text": "the"}), json!({"text": " "})])
            .unwrap();
    let ds = encode(&rows, &t, &DataConfig::text("text").max_length(4)).unwrap();
    let report = ds.report().unwrap();
    // bos, four words, eos.
    assert_eq!((report.truncated.len(), report.truncated_tokens, report.dropped.len()), (1, 2, 1));
    let text = format!("{report:?}");
    assert!(
        text.contains("1 truncated by 2 tokens (first: rows: row 1)") && text.contains("the text is empty"),
        "{text}"
    );
    assert!(report.to_string().contains("2 tokens lost (first: rows: row 1)"), "{report}");
}

fn lengths(lengths: &[usize]) -> Dataset {
    let example =
        |(i, &n): (usize, &usize)| Example::completion_only((0..n as u32).map(|t| t + 10 * i as u32).collect(), n / 2);
    Dataset::new(lengths.iter().enumerate().map(example).collect()).unwrap()
}

#[test]
fn packed_sequences_are_full_and_lose_nothing() {
    let ds = lengths(&[3, 5, 4, 2, 6, 1, 7]);
    let packed = ds.packed(7).unwrap();
    assert_eq!(packed.segments().unwrap(), [vec![3, 4], vec![5, 2], vec![6, 1], vec![7]]);
    assert_eq!((packed.len(), packed.total_tokens(), packed.max_len()), (4, 28, 7));
    assert_eq!(packed.trained_tokens(), ds.trained_tokens());
    // The flat batch is that of the examples one by one.
    let (a, b) = (Batch::new(&packed, &[0, 1]), Batch::new(&ds, &[0, 2, 1, 3]));
    assert_eq!(
        (&a.input_ids, &a.positions, &a.cu_seqlens, &a.labels),
        (&b.input_ids, &b.positions, &b.cu_seqlens, &b.labels)
    );
    assert_eq!(a.cu_seqlens, [0, 3, 7, 12, 14]);
    assert_eq!(a.examples, [0, 0, 1, 1]);
    assert!(ds.packed(6).unwrap_err().to_string().contains("example 6"));
    assert!(packed.packed(9).is_err());
    assert!(
        format!("{packed:?}").contains("4 packed sequences") && packed.to_string().contains("100.0 % full"),
        "{packed}"
    );
    // Saved with a run, and other data than the same tokens unpacked.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dataset.safetensors");
    tunebook::train::save_dataset(&path, &packed).unwrap();
    let again = tunebook::train::load_dataset(&path).unwrap();
    assert_eq!((again.segments(), again.examples()), (packed.segments(), packed.examples()));
    assert_eq!(again.fingerprint(), packed.fingerprint());
    assert_ne!(packed.fingerprint(), Dataset::new(packed.examples().to_vec()).unwrap().fingerprint());
    let (head, tail) = packed.split_at(1).unwrap();
    assert_eq!((head.segments().unwrap().len(), tail.segments().unwrap()[0].clone()), (1, vec![5, 2]));
    for bad in [vec![vec![3u32]], vec![vec![0, 3]], vec![vec![2, 2]], vec![]] {
        assert!(
            Dataset::with_segments(vec![Example::all_trained(vec![1, 2, 3])], bad.clone()).is_err() || bad == [vec![3]]
        );
    }
}

#[test]
fn packing_is_near_the_best_possible() {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    for _ in 0..50 {
        let n: Vec<usize> = (0..rng.random_range(1..200)).map(|_| rng.random_range(1..=64)).collect();
        let packed = lengths(&n).packed(64).unwrap();
        let least = n.iter().sum::<usize>().div_ceil(64);
        assert!(packed.len() <= least * 11 / 9 + 1, "{} of at least {least}", packed.len());
        let mut found: Vec<u32> = packed.segments().unwrap().concat();
        let mut given: Vec<u32> = n.iter().map(|&n| n as u32).collect();
        found.sort_unstable();
        given.sort_unstable();
        assert_eq!(found, given);
    }
}

#[test]
fn a_packed_run_has_the_losses_of_its_examples() {
    let base = tunebook::model::Base::from_dir(crate::support::golden("tiny/tiny-mistral/base")).unwrap();
    let plan = || tunebook::plan::MemoryPlan::qlora(base.spec()).cpu().r(4).batch(2).seq(32).build().unwrap();
    let ids = |n: usize, s: u32| (0..n as u32).map(|i| (i * 7 + s) % 200 + 3).collect::<Vec<u32>>();
    let ds = Dataset::new(vec![
        Example::completion_only(ids(9, 1), 3),
        Example::all_trained(ids(20, 2)),
        Example::all_trained(ids(11, 3)),
        Example::completion_only(ids(13, 4), 5),
    ])
    .unwrap();
    let packed = ds.packed(32).unwrap();
    assert_eq!(packed.len(), 2);
    let dir = tempfile::tempdir().unwrap();
    let loss = |name: &str, data: &Dataset| {
        let config = tunebook::train::TrainConfig::default().max_steps(1);
        let mut run =
            tunebook::train::Run::create(dir.path().join(name), plan(), base.clone(), packed.clone(), config).unwrap();
        run.evaluate(data).unwrap()
    };
    let (whole, each) = (loss("packed", &packed), loss("single", &ds));
    assert_eq!(whole.trained_tokens, each.trained_tokens);
    assert!((whole.loss - each.loss).abs() < 1e-6, "{} {}", whole.loss, each.loss);
    assert!(Path::new(&dir.path().join("packed/dataset.safetensors")).exists());
}
