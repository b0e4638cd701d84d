//! Chat templates as transformers renders them.

use serde_json::{Value, json};
use tunebook::data::{ChatOptions, ChatTemplate, Tokenizer, message};

use crate::support::shared;
use crate::tiny_tokenizer::{CHAT_TEMPLATE, tiny_tokenizer};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn render(source: &str, variables: &[(&str, Value)]) -> Result<String, tunebook::Error> {
    let mut template = ChatTemplate::new(source, Some("<s>"), None)?;
    for (name, value) in variables {
        template = template.set(name, value.clone());
    }
    template.render(&[message("user", "hi")], &ChatOptions::default())
}

#[test]
fn templates_are_python_flavoured() {
    let x = json!({"b": 1.0, "a": [true, null, "é\"<&>'\n"], "big": 1e16, "small": 1.5e-7, "i": 10, "e": {}});
    let cases = [
        (
            "{{ x | tojson }}",
            r#"{"b": 1.0, "a": [true, null, "é\"<&>'\n"], "big": 1e+16, "small": 1.5e-07, "i": 10, "e": {}}"#,
        ),
        ("{{ x.a | tojson(indent=2) }}", "[\n  true,\n  null,\n  \"é\\\"<&>'\\n\"\n]"),
        ("{{ x.a | tojson(separators=(',', ':'), ensure_ascii=true) }}", r#"[true,null,"\u00e9\"<&>'\n"]"#),
        ("{{ ' a '.strip() }}|{{ 'a-b'.split('-')[-1] }}|{{ 'x'.startswith('x') }}|{{ none }}", "a|b|True|None"),
        ("{% for k, v in x.items() %}{{ k }} {% endfor %}", "b a big small i e "),
        // trim_blocks and lstrip_blocks
        ("  {% if true %}\nyes\n  {% endif %}\nend", "yes\nend"),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        ("{{ bos_token }}{{ eos_token }}{{ messages[0]['content'] }}{{ tools is none }}", "<s>hiTrue"),
    ];
    for (source, expected) in cases {
        assert_eq!(render(source, &[("x", x.clone())]).unwrap(), expected, "{source}");
    }
    let year: i32 = render("{{ strftime_now('%Y') }}", &[]).unwrap().parse().unwrap();
    assert!(year >= 2024);
}

#[test]
fn errors_say_what_the_template_said_or_where_it_failed() {
    let e = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err().to_string();
    assert!(e.contains("refused") && e.contains("roles must alternate"), "{e}");
    let e = render("a\n\n{% if %}", &[]).unwrap_err().to_string();
    assert!(e.contains("line 3"), "{e}");
    let e = render("{{ messages[0].nothing.at_all }}", &[]).unwrap_err().to_string();
    assert!(e.contains("chat template failed"), "{e}");
    let template = ChatTemplate::new(CHATML, None, None).unwrap();
    assert!(template.render(&[], &ChatOptions::default()).unwrap_err().what().contains("no messages"));
    assert!(
        ChatTemplate::from_tokenizer(&Tokenizer::from_json(&crate::tiny_tokenizer::tokenizer_json(), None).unwrap())
            .is_err()
    );
    assert!(ChatTemplate::from_tokenizer(&tiny_tokenizer()).unwrap().source() == CHAT_TEMPLATE);
}

/// The parts of a rendered conversation that are the assistant's.
fn assistant(source: &str, messages: &[Value]) -> Vec<String> {
    let rendered =
        ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap().render_with_assistant(messages).unwrap();
    rendered.assistant.iter().map(|r| rendered.text[r.clone()].to_string()).collect()
}

#[test]
fn the_assistants_turns_are_found() {
    let chat =
        [message("user", "Hi"), message("assistant", "Hello"), message("user", "2+2?"), message("assistant", " 4 ")];
    assert_eq!(assistant(CHATML, &chat), ["Hello<|im_end|>\n", " 4 <|im_end|>\n"]);
    // An end of text only at the very end.
    let ends = format!("{}{{% if not add_generation_prompt %}}{{{{ eos_token }}}}{{% endif %}}", CHATML);
    assert_eq!(assistant(&ends, &chat), ["Hello<|im_end|>\n", " 4 <|im_end|>\n</s>"]);
    // A prompt that begins a thought, which finished turns have not.
    let thinks =
        CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif");
    assert_eq!(assistant(&thinks, &chat), ["Hello<|im_end|>\n", "4 <|im_end|>\n"]);
    // Marked by the template itself.
    let marked = "{% for m in messages %}\n{{ m.role }}: {% if m.role == 'assistant' %}{%- generation -%} {{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n\n{% endfor %}";
    assert_eq!(assistant(marked, &chat), ["Hello</s>", " 4 </s>"]);
    assert_eq!(render(marked, &[]).unwrap(), "user: hi\n");
}

#[test]
fn a_template_survives_being_saved() {
    let template = ChatTemplate::new(CHATML, None, Some("</s>")).unwrap().set("date_string", "today");
    let json = serde_json::to_string(&template).unwrap();
    let again: ChatTemplate = serde_json::from_str(&json).unwrap();
    assert_eq!(serde_json::to_string(&again).unwrap(), json);
    assert!(format!("{again:?}").contains("<|im_start|>user"));
}

#[test]
fn all_25_real_templates_render_as_in_transformers() {
    let Some(path) = shared("real/chat/golden.json") else { return };
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let tokenizers =
        [("mistral", super::data::real_tokenizer("mistral-7b-v0.1")), ("qwen2", super::data::real_tokenizer("qwen2"))];
    let (mut texts, mut errors, mut ids, mut masks, mut turns) = (0, 0, 0, 0, 0);
    for case in golden["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let about = &golden["templates"][name];
        let source = std::fs::read_to_string(path.with_file_name("templates").join(format!("{name}.jinja"))).unwrap();
        let mut template =
            ChatTemplate::new(&source, about["bos_token"].as_str(), about["eos_token"].as_str()).unwrap();
        for (key, value) in case["extra_context"].as_object().unwrap() {
            template = template.set(key, value.clone());
        }
        let messages = golden["conversations"][case["conversation"].as_str().unwrap()].as_array().unwrap();
        let flag = |key: &str| case["options"][key].as_bool().unwrap_or(false);
        let options = ChatOptions {
            add_generation_prompt: flag("add_generation_prompt"),
            continue_final_message: flag("continue_final_message"),
            tools: case["options"]["tools"].as_array().cloned(),
        };
        let found = template.render(messages, &options);
        let place = format!("{name}, {}, {}", case["conversation"], case["options"]);
        let Some(text) = case["text"].as_str() else {
            let error = found.expect_err(&place).to_string();
            let said = case["error"].as_str().unwrap();
            assert!(said.strip_prefix("TemplateError: ").is_none_or(|said| error.contains(said)), "{place}: {error}");
            errors += 1;
            continue;
        };
        assert_eq!(found.expect(&place), text, "{place}");
        texts += 1;
        if options == ChatOptions::default() {
            turns += assistant_turns_are_whole(&template, messages, &place);
        }
        let tokenizer = tokenizers.iter().find(|(key, _)| about["tokenizer"] == *key).and_then(|(_, t)| t.as_ref());
        let (Some(expected), Some(tokenizer)) = (case["ids"].as_array(), tokenizer) else { continue };
        let expected: Vec<u64> = expected.iter().map(|x| x.as_u64().unwrap()).collect();
        let encoding = tokenizer.encode_plain_with_offsets(text).unwrap();
        assert!(encoding.ids.iter().map(|&id| u64::from(id)).eq(expected), "{place}");
        ids += 1;
        let (Some(mask), false) = (case["assistant_mask"].as_array(), options != ChatOptions::default()) else {
            continue;
        };
        let chat = template.render_with_assistant(messages).unwrap();
        let inside = |&(start, end): &(usize, usize)| chat.assistant.iter().any(|r| start < r.end && end > r.start);
        let ours: Vec<u64> = encoding.offsets.iter().map(|o| u64::from(inside(o))).collect();
        assert!(ours.iter().copied().eq(mask.iter().map(|x| x.as_u64().unwrap())), "{place}");
        masks += 1;
    }
    assert_eq!(texts + errors, 825);
    println!("{texts} texts, {errors} errors, {ids} token lists, {masks} masks, {turns} turns");
    assert!(ids >= 200 && masks >= 10 && turns >= 100);
}

/// Each of the assistant's turns, and nothing of the others, is found; their number.
fn assistant_turns_are_whole(template: &ChatTemplate, messages: &[Value], place: &str) -> usize {
    let chat = template.render_with_assistant(messages).unwrap_or_else(|e| panic!("{place}: {e}"));
    let said = messages.iter().filter(|m| m["role"] == "assistant").map(|m| m["content"].as_str().unwrap().trim());
    let found: Vec<&str> = chat.assistant.iter().map(|r| &chat.text[r.clone()]).collect();
    for (i, (said, found)) in said.clone().filter(|s| !s.is_empty()).zip(&found).enumerate() {
        assert!(found.contains(said), "{place}, turn {i}: {found:?}");
        assert!(found.len() <= said.len() + 40, "{place}, turn {i}: {found:?}");
    }
    assert!(found.len() <= said.count(), "{place}: {found:?}");
    found.len()
}
