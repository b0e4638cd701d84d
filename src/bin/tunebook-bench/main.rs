//! `tunebook-bench`: speed and memory of the library on this machine, one JSON line for each measurement on stdout and a
//! summary for people on stderr.

mod args;
mod batches;
mod device;
mod files;
mod flops;
mod generate;
mod load;
mod memory;
mod merge;
mod nf4;
mod ops;
mod report;
mod rss;
mod setup;
mod train_step;

use std::process::ExitCode;

use tunebook::{Error, Result};

use args::{Args, Opt};

/// A subcommand: its name, what it measures, the options it knows, and the function that runs it.
struct Command {
    name: &'static str,
    about: &'static str,
    options: fn() -> Vec<Opt>,
    run: fn(&Args) -> Result<()>,
}

const COMMANDS: [Command; 7] = [
    Command {
        name: "train-step",
        about: "training steps: tokens per second, memory, FLOP per second",
        options: train_step::options,
        run: train_step::run,
    },
    Command { name: "ops", about: "each kind of operation at a model's shape", options: ops::options, run: ops::run },
    Command {
        name: "nf4",
        about: "quantization and dequantization in GB per second",
        options: nf4::options,
        run: nf4::run,
    },
    Command {
        name: "load",
        about: "Engine::load from the page cache: seconds and host memory",
        options: load::options,
        run: load::run,
    },
    Command {
        name: "generate",
        about: "prompt and decoding speed of one sequence, with and without the adapter",
        options: generate::options,
        run: generate::run,
    },
    Command {
        name: "merge",
        about: "an adapter merged into its base, from the page cache into files: seconds and host memory",
        options: merge::options,
        run: merge::run,
    },
    Command {
        name: "memory",
        about: "predicted against measured bytes of a process, for a list of configurations",
        options: memory::options,
        run: memory::run,
    },
];

fn main() -> ExitCode {
    match dispatch(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(raw: Vec<String>) -> Result<()> {
    let mut raw = raw.into_iter();
    let name = raw.next().unwrap_or_else(|| "--help".into());
    if matches!(name.as_str(), "--help" | "-h" | "help") {
        eprintln!("usage: tunebook-bench COMMAND [--option value ...]; COMMAND --help lists the options");
        for c in &COMMANDS {
            eprintln!("  {:<12} {}", c.name, c.about);
        }
        return Ok(());
    }
    let Some(command) = COMMANDS.iter().find(|c| c.name == name) else {
        return Err(Error::new("unknown command")
            .at("tunebook-bench")
            .expected(COMMANDS.map(|c| c.name).join(", "))
            .found(format!("`{name}`")));
    };
    let options = (command.options)();
    match Args::parse(command.name, &options, raw)? {
        Some(args) => (command.run)(&args),
        None => {
            eprintln!("usage: tunebook-bench {} [--option value ...]\n  {}", command.name, command.about);
            options.iter().for_each(|o| eprintln!("{}", o.usage()));
            Ok(())
        }
    }
}
