//! Rows, templates, tokens, loss masks, batches and their order.

use serde_json::Value;
use tunebook::data::{
    Batch, BatchView, Dataset, Example, IGNORE_INDEX, TextStream, Tokenizer, epoch_order, length_grouped,
};

use crate::support::{golden, shared};
use crate::tiny_tokenizer::tiny_tokenizer;

fn json(path: impl AsRef<std::path::Path>) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers<T: TryFrom<u64>>(v: &Value) -> Vec<T> {
    v.as_array().unwrap().iter().map(|x| T::try_from(x.as_u64().unwrap()).ok().unwrap()).collect()
}

#[test]
fn length_grouped_is_hugging_faces() {
    let file = json(golden("sampler/length_grouped.json"));
    let examples = file["examples"].as_array().unwrap();
    assert!(examples.len() >= 3);
    for example in examples {
        let lengths: Vec<usize> = numbers(&example["lengths"]);
        let mult = example["mega_batch_mult"].as_u64().map(|m| m as usize);
        let batch_size = example["batch_size"].as_u64().unwrap() as usize;
        let order = length_grouped(&lengths, batch_size, &numbers::<usize>(&example["randperm"]), mult).unwrap();
        assert_eq!(order, numbers::<usize>(&example["order"]));
    }
    assert!(length_grouped(&[3, 4], 1, &[0, 0], None).is_err());
    assert!(length_grouped(&[3, 4], 0, &[0, 1], None).is_err());
}

fn dataset(lengths: &[usize]) -> Dataset {
    Dataset::new(lengths.iter().map(|&n| Example::completion_only((0..n as u32).collect(), n / 2)).collect()).unwrap()
}

#[test]
fn epoch_order_is_a_permutation_of_its_own_for_each_epoch_and_seed() {
    let ds = dataset(&(1..=200).collect::<Vec<_>>());
    for grouped in [false, true] {
        let order = epoch_order(&ds, 7, 0, 4, grouped);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..200));
        assert_eq!(order, epoch_order(&ds, 7, 0, 4, grouped));
        assert_ne!(order, epoch_order(&ds, 7, 1, 4, grouped));
        assert_ne!(order, epoch_order(&ds, 8, 0, 4, grouped));
    }
    // A stored run must find its order again: these numbers may never change.
    assert_eq!(epoch_order(&dataset(&[1; 8]), 42, 3, 1, false), [6, 4, 3, 0, 2, 5, 7, 1]);
    // The longest example comes first, and neighbours have similar lengths.
    let order = epoch_order(&ds, 7, 0, 4, true);
    assert_eq!(order[0], 199);
    let spread = |o: &[usize]| o.chunks(4).map(|c| c.iter().max().unwrap() - c.iter().min().unwrap()).sum::<usize>();
    assert!(spread(&order) * 4 < spread(&epoch_order(&ds, 7, 0, 4, false)));
}

#[test]
fn a_batch_is_flat_and_its_labels_are_shifted() {
    let a = Example { input_ids: vec![10, 11, 12], labels: vec![IGNORE_INDEX, 11, 12] };
    let b = Example { input_ids: vec![20, 21], labels: vec![20, 21] };
    let ds = Dataset::new(vec![a, b]).unwrap();
    let batch = Batch::new(&ds, &[1, 0]);
    assert_eq!(batch.input_ids, [20, 21, 10, 11, 12]);
    assert_eq!(batch.positions, [0, 1, 0, 1, 2]);
    assert_eq!(batch.cu_seqlens, [0, 2, 5]);
    assert_eq!(batch.labels, [21, -100, 11, 12, -100]);
    assert_eq!(batch.examples, [1, 0]);
    assert_eq!((batch.tokens(), batch.num_items(), batch.max_len()), (5, 3, 3));
    assert_eq!((ds.total_tokens(), ds.trained_tokens(), ds.max_len(), ds.max_token_id()), (5, 3, 3, 21));
}

#[test]
fn padding_is_removed_by_the_mask_and_never_by_the_id() {
    // 2 is end of sequence, and serves as padding too: the real one keeps its label.
    let ids = [vec![5, 6, 2, 2], vec![2, 2, 7, 2]];
    let mask = [vec![1, 1, 1, 0], vec![0, 0, 1, 1]];
    let labels = [vec![-100, 6, 2, -100], vec![-100, -100, 7, 2]];
    let batch = Batch::from_padded(&ids, &mask, &labels).unwrap();
    assert_eq!(batch.input_ids, [5, 6, 2, 7, 2]);
    assert_eq!(batch.labels, [6, 2, -100, 2, -100]);
    assert_eq!(batch.positions, [0, 1, 2, 0, 1]);
    assert_eq!(batch.cu_seqlens, [0, 3, 5]);
    for bad in [vec![1, 0, 1, 1], vec![0, 0, 0, 0], vec![1, 1, 2, 0], vec![1, 1]] {
        assert!(Batch::from_padded(&ids, &[bad, mask[1].clone()], &labels).is_err());
    }
    assert!(Batch::from_padded(&ids[..1], &mask, &labels).is_err());
}

#[test]
fn malformed_data_sets_are_refused_and_equal_ones_have_equal_fingerprints() {
    assert!(Dataset::new(vec![]).unwrap_err().to_string().contains("empty"));
    assert!(Dataset::new(vec![Example { input_ids: vec![1], labels: vec![] }]).is_err());
    assert!(Dataset::new(vec![Example { input_ids: vec![], labels: vec![] }]).is_err());
    assert!(Dataset::new(vec![Example { input_ids: vec![1], labels: vec![-1] }]).is_err());
    let ds = dataset(&[3, 4]);
    assert_eq!(ds.fingerprint(), dataset(&[3, 4]).fingerprint());
    assert_eq!(ds.fingerprint().len(), 64);
    // The same tokens cut elsewhere, and other labels, are other data.
    assert_ne!(ds.fingerprint(), dataset(&[4, 3]).fingerprint());
    assert_ne!(
        ds.fingerprint(),
        Dataset::new(ds.examples().iter().map(|e| Example::all_trained(e.input_ids.clone())).collect())
            .unwrap()
            .fingerprint()
    );
    let (a, b) = ds.split_at(1).unwrap();
    assert_eq!((a.len(), b.len()), (1, 1));
    assert!(ds.split_at(2).is_err());
}

#[test]
fn the_tokenizer_adds_bos_once_and_knows_its_special_tokens() {
    let t = tiny_tokenizer();
    assert_eq!((t.bos_id(), t.eos_id(), t.unk_id(), t.pad_id()), (Some(1), Some(2), Some(0), None));
    let hello = t.encode("hello the cat").unwrap();
    assert_eq!(hello.len(), 4);
    assert_eq!(hello[0], 1);
    assert_eq!(t.encode("<s>hello the cat").unwrap().iter().filter(|&&id| id == 1).count(), 1);
    assert_eq!(t.encode_plain("hello the cat").unwrap(), hello[1..]);
    assert_eq!(t.decode(&hello).unwrap(), "hello the cat");
    assert_eq!(t.decode_with_special_tokens(&hello).unwrap(), "<s> hello the cat");
    assert!(format!("{t:?}").contains("bos `<s>` = 1"));
}

#[test]
fn a_stream_gives_the_text_piece_by_piece() {
    let t = tiny_tokenizer();
    let text = "the cat  says: hello, 日本 é!  the end";
    let ids = t.encode(text).unwrap();
    let mut stream = TextStream::new(&t, &[], false);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    assert_eq!(pieces.concat(), text);
    // A character of three byte tokens comes whole.
    assert!(pieces.contains(&"日".to_string()));
    // After a prompt, the first piece keeps its leading space.
    let mut stream = TextStream::new(&t, &ids[..2], false);
    assert_eq!(stream.push(ids[2]).unwrap(), " cat");
    // Bytes that never become a character are shown once generation goes on or ends.
    let broken = t.token_id("<0xE6>").unwrap();
    let mut stream = TextStream::new(&t, &ids[..2], false);
    assert_eq!(stream.push(broken).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn a_view_shows_which_tokens_are_trained_on() {
    let t = tiny_tokenizer();
    let ids = t.encode("the cat hello").unwrap();
    let ds = Dataset::new(vec![Example::completion_only(ids.clone(), 3), Example::all_trained(ids)]).unwrap();
    let view = BatchView::new(&Batch::new(&ds, &[0, 1]), &t).unwrap();
    let trained: Vec<bool> = view.tokens.iter().map(|t| t.trained).collect();
    // Nothing predicts the first token of an example.
    assert_eq!(trained, [false, false, false, true, false, true, true, true]);
    assert_eq!(view.tokens[3].text, " hello");
    assert_eq!(view.tokens[7].example, 1);
    assert_eq!(
        format!("{view:?}"),
        "Batch: 2 examples, 8 tokens, 4 trained on ⟦so⟧\n[0] <s> the cat⟦ hello⟧\n[1] <s>⟦ the cat hello⟧"
    );
}

#[test]
pub fn real_tokenizers_agree_with_transformers() {
    for name in ["mistral-7b-v0.1", "mistral-7b-instruct-v0.3", "qwen2"] {
        let Some(dir) = shared(&format!("real/tokenizers/{name}")) else { return };
        let tokenizer = real_tokenizer(name).unwrap();
        let cases = json(dir.join("golden.json"))["cases"].as_array().unwrap().clone();
        assert!(cases.len() > 10);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            // A text with its own `<s>` gets no second one, where transformers adds it.
            if !tokenizer.bos_token().is_some_and(|bos| text.starts_with(bos)) {
                assert_eq!(tokenizer.encode(text).unwrap(), numbers::<u32>(&case["ids"]), "{name}: {text:?}");
            }
            let plain = tokenizer.encode_plain(text).unwrap();
            assert_eq!(plain, numbers::<u32>(&case["ids_no_special"]), "{name}: {text:?}");
            let ids: Vec<u32> = numbers(&case["ids"]);
            assert_eq!(
                tokenizer.decode_with_special_tokens(&ids).unwrap(),
                case["decoded"].as_str().unwrap(),
                "{name}"
            );
            assert_eq!(tokenizer.decode(&ids).unwrap(), case["decoded_skip_special"].as_str().unwrap(), "{name}");
            let mut stream = TextStream::new(&tokenizer, &[], false);
            let mut streamed: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            streamed += &stream.finish().unwrap();
            assert_eq!(streamed, case["decoded_skip_special"].as_str().unwrap(), "{name}: {text:?}");
        }
    }
}

/// A real tokenizer, or `None` where there are none.
pub fn real_tokenizer(name: &str) -> Option<Tokenizer> {
    let dir = shared(&format!("real/tokenizers/{name}"))?;
    if dir.join("tokenizer.json").exists() {
        return Some(Tokenizer::from_dir(dir).unwrap());
    }
    let gz = std::process::Command::new("gzip").arg("-dc").arg(dir.join("tokenizer.json.gz")).output().unwrap();
    assert!(gz.status.success());
    let config = std::fs::read_to_string(dir.join("tokenizer_config.json")).unwrap();
    Some(Tokenizer::from_json(&String::from_utf8(gz.stdout).unwrap(), Some(&config)).unwrap())
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let t = tiny_tokenizer();
    let mut spec = tunebook::model::ModelSpec::preset("mistral-7b-v0.1").unwrap();
    t.check(&spec).unwrap();
    spec.vocab_size = t.vocab_size();
    t.check(&spec).unwrap();
    spec.vocab_size -= 1;
    let e = t.check(&spec).unwrap_err().to_string();
    assert!(e.contains("another vocabulary") && e.contains(&spec.name), "{e}");

    let json = crate::tiny_tokenizer::tokenizer_json();
    let from = |config: &str| Tokenizer::from_json(&json, Some(config));
    let e = from(r#"{"eos_token": "<|endoftext|>"}"#).unwrap_err().to_string();
    assert!(e.contains("`<|endoftext|>`") && e.contains("eos_token"), "{e}");
    assert!(from("[]").is_err() && from(r#"{"chat_template": 3}"#).is_err());
    for bad in ["", "{}", "[1]", &json[..json.len() / 2], r#"{"model": {"type": "BPE", "vocab": {}, "merges": []}}"#] {
        assert!(Tokenizer::from_json(bad, None).is_err(), "{bad}");
    }
    // add_bos_token of the config decides against tokenizer.json, both ways.
    let with = |add: &str| {
        from(&format!(r#"{{"bos_token": "<s>", "add_bos_token": {add}}}"#)).unwrap().encode("the cat").unwrap()
    };
    assert_eq!((with("true")[0], with("true").len(), with("false").len(), with("null").len()), (1, 3, 2, 3));
}

#[test]
fn a_tokenizer_directory_may_have_its_parts_in_several_files() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
    put("tokenizer.json", &crate::tiny_tokenizer::tokenizer_json());
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().eos_id(), None);
    put("special_tokens_map.json", r#"{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}"#);
    put(
        "tokenizer_config.json",
        r#"{"eos_token": "<|end|>", "chat_template": [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]}"#,
    );
    let t = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((t.eos_token(), t.bos_token(), t.chat_template_source()), (Some("<|end|>"), Some("<s>"), Some("b")));
    put("chat_template.jinja", "c");
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().chat_template_source(), Some("c"));
    put("tokenizer_config.json", "{");
    assert!(Tokenizer::from_dir(dir.path()).unwrap_err().to_string().contains("tokenizer_config.json"));
}
