//! All integration tests, one module per stage, in one binary: linking candle once is enough.

#[path = "suite/support.rs"]
mod support;

#[path = "suite/chat.rs"]
mod chat;
#[path = "suite/nf4.rs"]
mod nf4;
#[path = "suite/nf4_edges.rs"]
mod nf4_edges;
#[path = "suite/optimizer.rs"]
mod optimizer;

#[path = "suite/adapters.rs"]
mod adapters;
#[path = "suite/autograd.rs"]
mod autograd;
#[path = "suite/bad_input.rs"]
mod bad_input;
#[path = "suite/checkpoint.rs"]
mod checkpoint;
#[path = "suite/cuda.rs"]
mod cuda;
#[path = "suite/data.rs"]
mod data;
#[path = "suite/determinism.rs"]
mod determinism;
#[path = "suite/display.rs"]
mod display;
#[path = "suite/engine.rs"]
mod engine;
#[path = "suite/engine_errors.rs"]
mod engine_errors;
#[path = "suite/estimate.rs"]
mod estimate;
#[path = "suite/families.rs"]
mod families;
#[path = "suite/faults.rs"]
mod faults;
#[path = "suite/formats.rs"]
mod formats;
#[path = "suite/generate.rs"]
mod generate;
#[path = "suite/gguf.rs"]
mod gguf;
#[cfg(feature = "hub")]
#[path = "suite/hub.rs"]
mod hub;
#[path = "suite/kill_resume.rs"]
mod kill_resume;
#[path = "suite/lesson.rs"]
mod lesson;
#[path = "suite/lora.rs"]
mod lora;
#[path = "suite/model.rs"]
mod model;
#[path = "suite/oracle.rs"]
mod oracle;
#[path = "suite/oracle_models.rs"]
mod oracle_models;
#[path = "suite/placement.rs"]
mod placement;
#[path = "suite/plan.rs"]
mod plan;
#[path = "suite/real_run.rs"]
mod real_run;
#[path = "suite/rows.rs"]
mod rows;
#[path = "suite/run_errors.rs"]
mod run_errors;
#[path = "suite/stories.rs"]
mod stories;
#[path = "suite/tiny_tokenizer.rs"]
mod tiny_tokenizer;
#[path = "suite/train_config.rs"]
mod train_config;
#[path = "suite/trajectory.rs"]
mod trajectory;
