//! Rows, instruction templates, and what becomes of rows when they are tokenized.

use serde_json::json;
use tunebook::data::{
    Batch, BatchView, ChatTemplate, DataConfig, Dataset, IGNORE_INDEX, InstructionTemplate, Rows, Tokenizer, TrainOn,
    encode, message,
};

use crate::support::shared;
use crate::tiny_tokenizer::tiny_tokenizer;

fn file(text: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn jsonl_rows_are_read_line_by_line() {
    let f = file("\u{FEFF}{\"a\": \"x\", \"b\": 1}\n\n  \r\n{\"a\": null, \"c\": [1]}\r\n{\"a\": true}".as_bytes());
    let rows = Rows::from_jsonl(f.path()).unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows.columns(), ["a", "b", "c"]);
    assert_eq!(rows.text(0, "b").unwrap(), "1");
    assert_eq!(rows.text(1, "a").unwrap(), "");
    assert_eq!(rows.text(2, "a").unwrap(), "true");
    assert!(rows.place(1).ends_with(".jsonl:4"), "{}", rows.place(1));
    assert!(rows.get(3).is_none());
    assert_eq!((rows.head(2).len(), rows.slice(2, 9).len(), rows.slice(9, 9).len()), (2, 1, 0));
    assert!(rows.head(1).place(0).ends_with(":1") && rows.slice(1, 2).place(0).ends_with(":4"));
    assert!(rows.text(1, "c").unwrap_err().to_string().contains(":4"));
    assert!(format!("{rows:?}").starts_with("Rows: 3 from "));
}

#[test]
fn bad_files_are_named_with_their_line() {
    for (text, line, what) in [
        (&b"{\"a\": 1}\n{\"a\": 2\n"[..], ":2", "not JSON"),
        (b"{\"a\": 1}\n\n[1, 2]\n", ":3", "not a JSON object"),
        (b"{\"a\": \"\xff\"}\n", ":1", "not JSON"),
        (b"[\n{\"a\": 1}\n]", ":1", "not JSON"),
        (b"", ".jsonl", "no rows"),
        (b"\n \n", ".jsonl", "no rows"),
    ] {
        let f = file(text);
        let e = Rows::from_jsonl(f.path()).unwrap_err();
        assert!(e.what().contains(what) && e.place().unwrap().ends_with(line), "{e}");
    }
    assert!(Rows::from_jsonl("/nonexistent/rows.jsonl").unwrap_err().to_string().contains("/nonexistent/rows.jsonl"));
    assert!(Rows::from_values(vec![json!(1)]).is_err());
    assert!(Rows::from_values(vec![]).is_err());
}

#[test]
fn instruction_templates_fill_in_columns() {
    let rows = Rows::from_values(vec![
        json!({"instruction": "Add {x}.", "input": "1, 2", "output": "3"}),
        json!({"instruction": "Hi", "input": "", "output": "Hello"}),
        json!({"instruction": "Hi", "output": "Hello"}),
    ])
    .unwrap();
    let alpaca = InstructionTemplate::default();
    assert_eq!(alpaca.columns().unwrap(), ["instruction", "output"]);
    let prompt = alpaca.prompt(&rows, 0).unwrap();
    assert!(prompt.ends_with("### Instruction:\nAdd {x}.\n\n### Input:\n1, 2\n\n### Response:\n"), "{prompt}");
    let without = alpaca.prompt(&rows, 1).unwrap();
    assert!(without.ends_with("### Instruction:\nHi\n\n### Response:\n") && !without.contains("Input"));
    assert_eq!(alpaca.prompt(&rows, 2).unwrap(), without);
    assert_eq!(alpaca.prompt_for(&[("instruction", "Hi")]).unwrap(), without);
    assert_eq!(alpaca.completion(&rows, 0).unwrap(), "3");
    let braces = InstructionTemplate::new("{{{instruction}}} {{}}", "{output}");
    assert_eq!(braces.prompt(&rows, 1).unwrap(), "{Hi} {}");
    for bad in ["{", "}", "{}", "{a{b}", "a {instruction"] {
        assert!(InstructionTemplate::new(bad, "").prompt(&rows, 0).is_err(), "{bad}");
    }
    assert!(alpaca.prompt_for(&[("input", "x")]).unwrap_err().to_string().contains("`instruction`"));
}

#[test]
fn missing_columns_are_named_with_the_nearest() {
    let t = tiny_tokenizer();
    let f = file(b"{\"instruction\": \"a\", \"outputs\": \"b\"}\n");
    let rows = Rows::from_jsonl(f.path()).unwrap();
    let e = encode(&rows, &t, &DataConfig::instruction(InstructionTemplate::alpaca())).unwrap_err().to_string();
    assert!(e.contains("`output`") && e.contains("did you mean `outputs`?") && e.contains(".jsonl"), "{e}");
    let f = file(b"{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"a\"}\n");
    let e = encode(&Rows::from_jsonl(f.path()).unwrap(), &t, &DataConfig::instruction(InstructionTemplate::alpaca()))
        .unwrap_err();
    assert!(e.place().unwrap().ends_with(":2"), "{e}");
}

/// The text that is trained on, token by token.
fn trained_text(ds: &Dataset, i: usize, t: &Tokenizer) -> String {
    let view = BatchView::new(&Batch::new(ds, &[i]), t).unwrap();
    view.tokens.iter().filter(|x| x.trained).map(|x| x.text.as_str()).collect()
}

#[test]
fn completions_are_trained_on_and_prompts_are_not() {
    let t = tiny_tokenizer();
    let rows = Rows::from_values(vec![json!({"q": "the cat?", "a": "hello é"}), json!({"q": "x", "a": " "})]).unwrap();
    let config = DataConfig::instruction(InstructionTemplate::new("Q: {q}\nA:", " {a}"));
    let ds = encode(&rows, &t, &config).unwrap();
    assert_eq!(ds.len(), 1);
    let example = ds.get(0);
    assert_eq!(example.input_ids[0], 1);
    assert_eq!(t.decode(&example.input_ids).unwrap(), "Q: the cat?\nA: hello é");
    let prompt = t.encode("Q: the cat?\nA:").unwrap();
    // Token by token what generation would be given.
    assert_eq!(example.input_ids[..prompt.len()], prompt);
    assert!(example.labels[..prompt.len()].iter().all(|&l| l == IGNORE_INDEX));
    assert!(
        example.labels[prompt.len()..].iter().zip(&example.input_ids[prompt.len()..]).all(|(&l, &id)| l == id as i32)
    );
    assert_eq!(trained_text(&ds, 0, &t), " hello <0xC3>é</s>");
    let report = ds.report().unwrap();
    assert_eq!((report.rows, report.kept, report.merged_boundaries, report.unk_tokens), (2, 1, 0, 0));
    assert_eq!((report.tokens, report.trained_tokens), (example.input_ids.len(), example.trained_tokens()));
    assert_eq!(report.dropped[0].place, "rows: row 2");
    assert_eq!(report.lengths.iter().map(|b| b.count).sum::<usize>(), 1);
    // All tokens, and no end of sequence.
    let all = encode(&rows, &t, &config.clone().train_on(TrainOn::All).add_eos(false)).unwrap();
    assert_eq!(all.get(0).input_ids, example.input_ids[..example.input_ids.len() - 1]);
    assert_eq!(all.get(0).trained_tokens(), all.get(0).input_ids.len() - 1);
}

#[test]
fn a_token_across_the_boundary_is_trained_on_and_counted() {
    let t = tiny_tokenizer();
    let rows = Rows::from_values(vec![json!({"q": "x", "a": "the cat"})]).unwrap();
    // The space at the end of the prompt becomes part of `▁the`.
    let ds = encode(&rows, &t, &DataConfig::instruction(InstructionTemplate::new("{q} ", "{a}"))).unwrap();
    assert_eq!(trained_text(&ds, 0, &t), " the cat</s>");
    assert_eq!(ds.report().unwrap().merged_boundaries, 1);
}

#[test]
fn long_examples_are_cut_and_those_without_a_completion_dropped() {
    let t = tiny_tokenizer();
    let rows = Rows::from_values(vec![
        json!({"q": "the", "a": "cat"}),
        json!({"q": "the cat the cat", "a": "hello"}),
        json!({"q": "", "a": "the cat the"}),
    ])
    .unwrap();
    let config = DataConfig::instruction(InstructionTemplate::new("{q}", " {a}")).max_length(4);
    let ds = encode(&rows, &t, &config).unwrap();
    assert_eq!(ds.len(), 2);
    assert_eq!(trained_text(&ds, 0, &t), " cat</s>");
    let report = ds.report().unwrap();
    assert_eq!(report.truncated, ["rows: row 3"]);
    assert_eq!(report.drop_reasons(), [("nothing to train on is left within max_length".to_string(), 1)]);
    assert!(ds.max_len() <= 4 && report.max_len == ds.max_len());
    let e = encode(&rows.slice(1, 1), &t, &config).unwrap_err().to_string();
    assert!(e.contains("no row is left") && e.contains("max_length"), "{e}");
    assert!(encode(&rows, &t, &config.max_length(1)).is_err());
}

#[test]
fn conversations_train_on_the_assistant_and_get_no_second_bos() {
    let t = tiny_tokenizer();
    let chat = json!([
        message("user", "hello"),
        message("assistant", "the cat"),
        message("user", "the"),
        message("assistant", "cat")
    ]);
    let rows = Rows::from_values(vec![
        json!({"messages": chat}),
        json!({"messages": [message("user", "hello")]}),
        json!({"messages": []}),
    ])
    .unwrap();
    let config = DataConfig::messages(ChatTemplate::from_tokenizer(&t).unwrap());
    let ds = encode(&rows, &t, &config).unwrap();
    assert_eq!(ds.len(), 1);
    assert_eq!(ds.get(0).input_ids.iter().filter(|&&id| id == 1).count(), 1);
    assert_eq!(trained_text(&ds, 0, &t).replace(' ', ""), "thecat<|end|>cat<|end|>");
    assert_eq!(ds.report().unwrap().drop_reasons().len(), 2);
    for bad in [json!("hello"), json!([{"content": "no role"}])] {
        let rows = Rows::from_values(vec![json!({"messages": chat}), json!({"messages": bad})]).unwrap();
        assert!(encode(&rows, &t, &config).unwrap_err().place().unwrap().contains("row 2"));
    }
    // The settings are saved with a run.
    let json = serde_json::to_string(&config).unwrap();
    let again: DataConfig = serde_json::from_str(&json).unwrap();
    assert_eq!(encode(&rows, &t, &again).unwrap().fingerprint(), ds.fingerprint());
}

#[test]
fn plain_text_is_trained_on_whole() {
    let t = tiny_tokenizer();
    let rows =
        Rows::from_values(vec![json!({"text": "the cat"}), json!({"text": "<s>the cat</s>"}), json!({"text": ""})])
            .unwrap();
    let ds = encode(&rows, &t, &DataConfig::text("text")).unwrap();
    // Written-out special tokens are not doubled.
    assert_eq!(ds.get(0).input_ids, ds.get(1).input_ids);
    assert_eq!(trained_text(&ds, 0, &t), " the cat</s>");
    assert!(encode(&rows, &t, &DataConfig::text("text").train_on(TrainOn::Completion)).is_err());
}

#[cfg(feature = "polars")]
#[test]
fn rows_become_a_data_frame_and_back() {
    let rows = Rows::from_values(vec![
        json!({"text": "a", "n": 1, "x": 0.5, "ok": true, "mixed": 1, "none": null}),
        json!({"text": null, "n": 2, "x": 2, "ok": false, "mixed": "b", "none": null}),
    ])
    .unwrap();
    let frame = rows.to_frame().unwrap();
    assert_eq!(frame.shape(), (2, 6));
    let again = Rows::from_frame(&frame).unwrap();
    assert_eq!(again.columns(), rows.columns());
    assert_eq!(again.get(0).unwrap()["n"], json!(1));
    assert_eq!(again.get(1).unwrap()["x"], json!(2.0));
    assert_eq!(again.get(1).unwrap()["text"], json!(null));
    assert_eq!(again.text(0, "mixed").unwrap(), "1");
}

#[test]
fn dolly_and_fastchat_rows_become_data_sets() {
    let (Some(dolly), Some(chat)) =
        (shared("real/data/dolly_1000.jsonl"), shared("real/data/fastchat_messages_300.jsonl"))
    else {
        return;
    };
    let t = super::data::real_tokenizer("mistral-7b-v0.1").unwrap();
    let rows = Rows::from_jsonl(dolly).unwrap();
    assert_eq!(rows.len(), 1000);
    let template = InstructionTemplate::alpaca_columns("instruction", "context", "response");
    let config = DataConfig::instruction(template.clone());
    let cut = encode(&rows, &t, &config.clone().max_length(512)).unwrap();
    let report = cut.report().unwrap();
    println!("{report:?}");
    assert_eq!(report.kept + report.dropped.len(), 1000);
    assert!(cut.max_len() == 512 && !report.truncated.is_empty() && report.kept > 900);
    let ds = encode(&rows, &t, &config).unwrap();
    assert_eq!((ds.len(), ds.report().unwrap().unk_tokens, ds.report().unwrap().merged_boundaries), (1000, 0, 0));
    for (i, example) in ds.examples().iter().enumerate().take(50) {
        let masked = example.labels.iter().take_while(|&&l| l == IGNORE_INDEX).count();
        let prompt = t.encode(&template.prompt(&rows, i).unwrap()).unwrap();
        assert_eq!(prompt, example.input_ids[..masked], "row {i}");
    }
    let source = std::fs::read_to_string(shared("real/chat/templates/zephyr-tinyllama.jinja").unwrap()).unwrap();
    let zephyr = ChatTemplate::new(&source, Some("<s>"), Some("</s>")).unwrap();
    let rows = Rows::from_jsonl(chat).unwrap();
    let ds = encode(&rows, &t, &DataConfig::messages(zephyr)).unwrap();
    println!("{:?}", ds.report().unwrap());
    for i in 0..20 {
        let said = rows.get(i).unwrap()["messages"].as_array().unwrap().iter().filter(|m| m["role"] == "assistant");
        let text = trained_text(&ds, i, &t);
        assert!(said.clone().count() > 0);
        for message in said {
            assert!(text.contains(message["content"].as_str().unwrap().trim()), "{text}");
        }
        assert!(!text.contains("<|user|>") && !text.contains("<|assistant|>"), "{text}");
    }
}
