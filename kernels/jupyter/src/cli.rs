//! The command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use lexopt::prelude::{Long, Short, Value};

use crate::template::Layout;
use crate::{doctor, install, runner, server, stock};

const HELP: &str = "\
tunebook-kernel: Rust in Jupyter

  lab [-- ARGUMENTS]     everything from a fresh machine to JupyterLab open on notebooks/
  install [--user | --prefix DIR]   the kernel for Jupyter, in .venv unless said otherwise; compiles the library once
  uninstall [--user | --prefix DIR]
  run NOTEBOOK...        executes notebooks; fails with the cell and the message on any error, panic, `?` or output on stderr
      --out DIR          where the executed .ipynb and .html go (target/notebooks)
      --stock            under stock evcxr_jupyter 0.22
      --timeout S        for one cell (600)
      --startup-timeout S   for the kernel (120)
      --save             keep the outputs in notebooks that passed
  doctor                 what is there, what is missing, and the command that fixes it

Environment: CARGO_TARGET_DIR, TUNEBOOK_VENV (the Python environment; .venv).
";

/// What was asked.
enum Asked {
    Help,
    Version,
    Lab(Vec<String>),
    Install(install::Place),
    Uninstall(install::Place),
    Run(runner::Options),
    Doctor,
    /// By Jupyter, through the kernel's spec.
    Kernel(PathBuf, Option<PathBuf>),
    /// By `run --stock`.
    Stock(PathBuf, Option<PathBuf>),
    /// By tests: cells on standard input, as evcxr's REPL shows them.
    StockRepl,
}

/// Does what the command line says.
pub fn run() -> ExitCode {
    let asked = match parse(lexopt::Parser::from_env()) {
        Ok(asked) => asked,
        Err(e) => {
            eprintln!("tunebook-kernel: {e}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    match answer(asked) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("tunebook-kernel: {message}");
            ExitCode::FAILURE
        }
    }
}

fn answer(asked: Asked) -> Result<bool, String> {
    let mut layout = Layout::here();
    match asked {
        Asked::Help => print!("{HELP}"),
        Asked::Version => println!("tunebook-kernel {}", env!("CARGO_PKG_VERSION")),
        Asked::Lab(arguments) => return install::lab(&layout, &arguments).map(|()| true),
        Asked::Install(place) => install::install(&layout, &place)?,
        Asked::Uninstall(place) => install::uninstall(&layout, &place)?,
        Asked::Run(options) => return runner::run(&options, &layout),
        Asked::Doctor => return Ok(doctor::run(&layout)),
        Asked::Kernel(file, target) => {
            layout.target = target.unwrap_or(layout.target);
            server::run(&file, &layout)?;
        }
        Asked::Stock(file, target) => {
            layout.target = target.unwrap_or(layout.target);
            return stock::run(&layout, &file);
        }
        Asked::StockRepl => return stock::repl(&layout),
    }
    Ok(true)
}

fn parse(mut parser: lexopt::Parser) -> Result<Asked, lexopt::Error> {
    let command = match parser.next()? {
        None | Some(Short('h') | Long("help")) => return Ok(Asked::Help),
        Some(Long("version")) => return Ok(Asked::Version),
        Some(Value(v)) => v.into_string().unwrap_or_default(),
        Some(other) => return Err(other.unexpected()),
    };
    match command.as_str() {
        "lab" => {
            let mut arguments = Vec::new();
            while let Some(arg) = parser.next()? {
                match arg {
                    Value(v) => arguments.push(v.to_string_lossy().into_owned()),
                    other => return Err(other.unexpected()),
                }
            }
            Ok(Asked::Lab(arguments))
        }
        "install" => place(parser).map(Asked::Install),
        "uninstall" => place(parser).map(Asked::Uninstall),
        "run" => options(parser).map(Asked::Run),
        "doctor" => nothing_more(parser).map(|()| Asked::Doctor),
        "stock-repl" => nothing_more(parser).map(|()| Asked::StockRepl),
        "help" => Ok(Asked::Help),
        "kernel" => connection(parser).map(|(file, target)| Asked::Kernel(file, target)),
        "stock" => connection(parser).map(|(file, target)| Asked::Stock(file, target)),
        other => Err(format!("unknown command {other:?}").into()),
    }
}

fn nothing_more(mut parser: lexopt::Parser) -> Result<(), lexopt::Error> {
    parser.next()?.map_or(Ok(()), |arg| Err(arg.unexpected()))
}

fn place(mut parser: lexopt::Parser) -> Result<install::Place, lexopt::Error> {
    let mut place = install::Place::Environment;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("user") => place = install::Place::User,
            Long("prefix") => place = install::Place::Prefix(parser.value()?.into()),
            other => return Err(other.unexpected()),
        }
    }
    Ok(place)
}

fn connection(mut parser: lexopt::Parser) -> Result<(PathBuf, Option<PathBuf>), lexopt::Error> {
    let (mut file, mut target) = (None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("target") => target = Some(parser.value()?.into()),
            Value(v) if file.is_none() => file = Some(v.into()),
            other => return Err(other.unexpected()),
        }
    }
    Ok((file.ok_or("no connection file")?, target))
}

fn options(mut parser: lexopt::Parser) -> Result<runner::Options, lexopt::Error> {
    use lexopt::ValueExt;
    let mut o = runner::Options {
        notebooks: Vec::new(),
        out: "target/notebooks".into(),
        stock: false,
        timeout: Duration::from_secs(600),
        start_timeout: Duration::from_secs(120),
        save: false,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Long("out") => o.out = parser.value()?.into(),
            Long("stock") => o.stock = true,
            Long("timeout") => o.timeout = Duration::from_secs(parser.value()?.parse()?),
            Long("startup-timeout") => o.start_timeout = Duration::from_secs(parser.value()?.parse()?),
            Long("save") => o.save = true,
            Value(v) => o.notebooks.push(v.into()),
            other => return Err(other.unexpected()),
        }
    }
    if o.notebooks.is_empty() {
        return Err("run what? give notebooks".into());
    }
    Ok(o)
}
