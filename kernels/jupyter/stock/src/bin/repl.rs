//! What evcxr's REPL makes of cells, without its line editor: standard input is read to its end, cells are separated by lines
//! `//---`. Text goes to standard output as it comes, then the value's `text/plain`; errors to standard error.

use std::io::Read;
use std::process::ExitCode;

fn main() -> ExitCode {
    evcxr::runtime_hook();
    let mut text = String::new();
    if let Err(e) = std::io::stdin().read_to_string(&mut text) {
        eprintln!("standard input: {e}");
        return ExitCode::FAILURE;
    }
    let (mut context, outputs) = match evcxr::CommandContext::new() {
        Ok(new) => new,
        Err(e) => {
            eprintln!("evcxr does not start: {e}");
            return ExitCode::FAILURE;
        }
    };
    std::thread::spawn(move || outputs.stderr.iter().for_each(|line| eprintln!("{line}")));
    std::thread::spawn(move || outputs.stdout.iter().for_each(|line| println!("{line}")));
    let mut worked = true;
    for cell in text.split("\n//---\n") {
        println!(">> {}", cell.trim().lines().next().unwrap_or_default());
        match context.execute(cell) {
            Ok(value) => {
                if let Some(plain) = value.get("text/plain") {
                    println!("{plain}");
                }
            }
            Err(e) => {
                eprintln!("{e}");
                worked = false;
            }
        }
    }
    if worked { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
