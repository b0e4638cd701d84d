//! Configuration, learning rate and step counts, against the Trainer of transformers 5.23.

use serde_json::Value;
use tunebook::train::{LrScheduler, Optim, StepBatches, TrainConfig, lr_at, lr_curve};

use crate::support::golden;

/// Every golden run: its configuration and its steps.
fn golden_runs() -> Vec<(String, TrainConfig, Vec<Value>)> {
    let mut runs = Vec::new();
    for model in ["tiny-mistral", "tiny-llama"] {
        let dir = golden(&format!("tiny/{model}/train"));
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path().join("run.json");
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            let run: Value = serde_json::from_str(&text).unwrap();
            let spec = &run["spec"];
            let cfg = TrainConfig::default()
                .max_steps(20)
                .learning_rate(2e-3)
                .weight_decay(0.001)
                .optim(spec["opt"].as_str().unwrap().parse().unwrap())
                .lr_scheduler_type(spec["sched"].as_str().unwrap().parse().unwrap())
                .warmup_steps(spec["warm"].as_u64().unwrap_or(0));
            runs.push((path.display().to_string(), cfg, run["steps"].as_array().unwrap().clone()));
        }
    }
    runs
}

#[test]
fn learning_rates_are_the_trainers() {
    let runs = golden_runs();
    assert_eq!(runs.len(), 19);
    let mut worst: f64 = 0.0;
    for (name, cfg, steps) in runs {
        cfg.validate_for(80).unwrap();
        for (k, step) in steps.iter().enumerate() {
            let (ours, theirs) = (lr_at(&cfg, k as u64, 20), step["learning_rate"].as_f64().unwrap());
            if cfg.lr_scheduler_type == LrScheduler::Cosine {
                worst = worst.max((ours - theirs).abs() / cfg.learning_rate);
            } else {
                // serde_json may read the file's digits one unit in the last place off.
                assert!((ours - theirs).abs() <= theirs * f64::EPSILON, "{name} step {k}: {ours} {theirs}");
            }
        }
    }
    assert!(worst <= 2.0 * f64::EPSILON, "cosine differs by {worst:e} of the peak");
}

#[test]
fn curves_have_their_ends() {
    let cfg = TrainConfig::default().learning_rate(1.0).warmup_ratio(0.03);
    for scheduler in [LrScheduler::ConstantWithWarmup, LrScheduler::Linear, LrScheduler::Cosine] {
        let cfg = cfg.clone().lr_scheduler_type(scheduler);
        // transformers rounds a ratio up: ceil(0.03 * 90) = 3.
        assert_eq!(cfg.warmup(90), 3);
        let curve = lr_curve(&cfg, 90);
        assert_eq!(curve.len(), 90);
        assert_eq!(curve[0], 0.0);
        assert_eq!(curve[3], 1.0);
        assert!(curve.iter().all(|lr| (0.0..=1.0).contains(lr)));
        let end = if scheduler == LrScheduler::ConstantWithWarmup { 1.0 } else { 0.0 };
        assert_eq!(lr_at(&cfg, 90, 90), end);
        assert_eq!(lr_at(&cfg, u64::MAX, 90), end);
    }
    assert_eq!(lr_at(&TrainConfig::default(), 0, 1), 2e-4);
}

#[test]
fn steps_are_counted_as_the_trainer_counts() {
    let cfg =
        TrainConfig::default().per_device_train_batch_size(4).gradient_accumulation_steps(4).num_train_epochs(3.0);
    // 100 examples: 25 batches, 7 steps an epoch, the last of them with one batch.
    assert_eq!(cfg.effective_batch(), 16);
    assert_eq!((cfg.batches_per_epoch(100), cfg.steps_per_epoch(100)), (25, 7));
    assert_eq!(cfg.total_steps(100).unwrap(), 21);
    assert_eq!(cfg.clone().num_train_epochs(0.5).total_steps(100).unwrap(), 4);
    assert_eq!(cfg.clone().max_steps(5).total_steps(100).unwrap(), 5);
    assert_eq!(cfg.step_batches(5, 100), StepBatches { epoch: 0, first: 20, count: 4 });
    assert_eq!(cfg.step_batches(6, 100), StepBatches { epoch: 0, first: 24, count: 1 });
    assert_eq!(cfg.step_batches(7, 100), StepBatches { epoch: 1, first: 0, count: 4 });
    assert_eq!(cfg.epochs_done(7, 100), 1.0);
    // Every batch of an epoch is in exactly one step.
    for (n, batch, accumulation) in [(1, 1, 1), (1, 8, 4), (7, 2, 3), (100, 4, 4), (97, 5, 2)] {
        let cfg = TrainConfig::default().per_device_train_batch_size(batch).gradient_accumulation_steps(accumulation);
        let per_epoch = cfg.steps_per_epoch(n);
        let spans: Vec<StepBatches> = (0..per_epoch).map(|s| cfg.step_batches(s, n)).collect();
        assert!(spans.windows(2).all(|w| w[0].first + w[0].count == w[1].first));
        let last = spans.last().unwrap();
        assert_eq!(last.first + last.count, cfg.batches_per_epoch(n));
        assert!(last.count > 0 && last.epoch == 0);
    }
    assert!(cfg.total_steps(0).unwrap_err().to_string().contains("nothing to train on"));
    let endless = cfg.num_train_epochs(1e300).total_steps(100).unwrap_err().to_string();
    assert!(endless.contains("num_train_epochs") && endless.contains("max_steps"), "{endless}");
}

#[test]
fn toml_round_trips_every_field() {
    let cfg = TrainConfig::default()
        .num_train_epochs(2.5)
        .max_steps(100)
        .per_device_train_batch_size(2)
        .gradient_accumulation_steps(8)
        .optim(Optim::PagedAdamW8bit)
        .learning_rate(1.0 / 3000.0)
        .weight_decay(0.001)
        .adam_beta1(0.8)
        .adam_beta2(0.95)
        .adam_epsilon(1e-7)
        .max_grad_norm(0.0)
        .warmup_ratio(0.1)
        .lr_scheduler_type(LrScheduler::Cosine)
        .shuffle(true)
        .group_by_length(true)
        .save_steps(7)
        .logging_steps(3)
        .save_total_limit(2)
        .eval_steps(20)
        .seed(7);
    let text = cfg.to_toml().unwrap();
    assert_eq!(text.lines().count(), 21, "{text}");
    assert_eq!(TrainConfig::from_toml_str(&text).unwrap(), cfg);
    assert_eq!(TrainConfig::from_toml_str("").unwrap(), TrainConfig::default());
    let read = TrainConfig::from_toml_str("learning_rate = 1\noptim = 'adamw_torch'\nnum_train_epochs = 3").unwrap();
    assert_eq!((read.learning_rate, read.optim, read.num_train_epochs), (1.0, Optim::AdamW, 3.0));
    for (alias, optim) in [("paged_adamw", Optim::PagedAdamW32bit), ("adamw_bnb_8bit", Optim::AdamW8bit)] {
        assert_eq!(alias.parse::<Optim>().unwrap(), optim);
    }
    for optim in Optim::ALL {
        assert_eq!(optim.to_string().parse::<Optim>().unwrap(), optim);
    }
    assert_eq!(TrainConfig::default().seed(u64::MAX).to_toml().unwrap_err().place(), Some("seed"));
}

#[test]
fn every_problem_is_reported_at_once() {
    let e = TrainConfig::from_toml_str(
        "learing_rate = 2e-4\nmax_steps = -1\noptim = \"paged_adam_8bit\"\nbf16 = true\nlogging_steps = 0\nadam_beta2 = 1.5",
    )
    .unwrap_err();
    assert_eq!(
        e.to_string(),
        "the training configuration cannot be used
  expected: no problem
  found:    6 problems:
    bf16: expected a field of TrainConfig; found unknown field `bf16`; leave it out: the plan chooses the compute dtype
    learing_rate: expected a field of TrainConfig; found unknown field `learing_rate`; did you mean `learning_rate`?
    max_steps: expected a whole number from 0; found -1; leave `max_steps` out for no limit
    optim: expected one of adamw, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit; found \"paged_adam_8bit\"; did you mean \"paged_adamw_8bit\"?
    logging_steps: expected a whole number from 1; found 0; give a large number for few lines
    adam_beta2: expected a number from 0 to below 1; found 1.5; 0.999 is usual
  next:     correct these fields"
    );
}

#[test]
fn one_problem_is_a_plain_error() {
    let e = "cosin".parse::<LrScheduler>().unwrap_err();
    assert_eq!((e.place(), e.next_step()), (Some("lr_scheduler_type"), Some("did you mean \"cosine\"?")));
    let e = TrainConfig::from_toml_str("learning_rate = '2e-4'").unwrap_err();
    assert_eq!((e.place(), e.next_step()), (Some("learning_rate"), Some("write it without quotes")));
    let e = TrainConfig::from_toml_str("shuffle = 1").unwrap_err().to_string();
    assert!(e.contains("expected: true or false\n  found:    1"), "{e}");
    let e = TrainConfig::from_toml_str("learning_rate = ").unwrap_err();
    assert_eq!(e.what(), "the training configuration is not TOML");
    let e = TrainConfig::from_toml("/nowhere/train.toml").unwrap_err();
    assert_eq!(e.place(), Some("/nowhere/train.toml"));
}

#[test]
fn a_warmup_that_would_do_nothing_is_refused() {
    // The article's configuration: transformers accepts it and never warms up.
    let e = TrainConfig::default().warmup_ratio(0.03).validate().unwrap_err();
    assert_eq!(e.place(), Some("lr_scheduler_type"));
    assert!(e.next_step().unwrap().contains("constant_with_warmup"));
    assert!(
        TrainConfig::default().warmup_ratio(0.03).lr_scheduler_type(LrScheduler::ConstantWithWarmup).validate().is_ok()
    );

    let linear = TrainConfig::default().lr_scheduler_type(LrScheduler::Linear);
    assert!(linear.clone().warmup_steps(3).warmup_ratio(0.1).validate().is_err());
    assert_eq!(linear.clone().warmup_steps(60).max_steps(60).validate().unwrap_err().place(), Some("warmup_steps"));
    // 10 examples in batches of 4: 3 steps.
    assert_eq!(linear.clone().warmup_steps(3).validate_for(10).unwrap_err().place(), Some("warmup_steps"));
    assert_eq!(linear.warmup_steps(2).validate_for(10).unwrap(), 3);
}

#[test]
fn each_field_has_its_range() {
    type Change = fn(TrainConfig) -> TrainConfig;
    let bad: [(&str, Change); 20] = [
        ("num_train_epochs", |c| c.num_train_epochs(0.0)),
        ("num_train_epochs", |c| c.num_train_epochs(f64::NAN)),
        ("max_steps", |c| c.max_steps(0)),
        ("per_device_train_batch_size", |c| c.per_device_train_batch_size(0)),
        ("gradient_accumulation_steps", |c| c.gradient_accumulation_steps(usize::MAX)),
        ("learning_rate", |c| c.learning_rate(0.0)),
        ("learning_rate", |c| c.learning_rate(2e4)),
        ("learning_rate", |c| c.learning_rate(f64::NAN)),
        ("weight_decay", |c| c.weight_decay(-0.1)),
        ("adam_beta1", |c| c.adam_beta1(1.0)),
        ("adam_beta2", |c| c.adam_beta2(0.999_999_999_9)),
        ("adam_epsilon", |c| c.adam_epsilon(0.0)),
        ("adam_epsilon", |c| c.adam_epsilon(1e-50)),
        ("max_grad_norm", |c| c.max_grad_norm(f64::INFINITY)),
        ("warmup_ratio", |c| c.warmup_ratio(1.0).lr_scheduler_type(LrScheduler::Linear)),
        ("warmup_ratio", |c| c.warmup_ratio(f64::NAN)),
        ("save_total_limit", |c| c.save_total_limit(0)),
        ("logging_steps", |c| c.logging_steps(0)),
        ("eval_steps", |c| c.eval_steps(0)),
        ("group_by_length", |c| c.shuffle(false).group_by_length(true)),
    ];
    assert_eq!(TrainConfig::default().problems(), []);
    for (field, change) in bad {
        let fields: Vec<String> = change(TrainConfig::default()).problems().into_iter().map(|p| p.field).collect();
        assert_eq!(fields, [field]);
    }
}
