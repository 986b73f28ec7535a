//! `valkeeper-replay`: reads the command line, calls one verb, prints its answer.

mod args;

use anyhow::Context;
use args::{Audit, Blame, CommandLine, Verb};
use clap::Parser;
use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
};
use valkeeper_replay::{
    Error, at, audit, blame, deep, diverge, explain, export, log,
    report::{Finding, Format, Report, render},
    show,
    source::{self, Origin, Stream},
    verify::{self, Verified},
    why,
};

/// Something went wrong.
const EXIT_ERROR: u8 = 1;
/// The question was wrong.
const EXIT_USAGE: u8 = 2;
/// A divergence or violation was found.
const EXIT_FOUND: u8 = 3;

fn main() -> ExitCode {
    match run(CommandLine::parse()) {
        Ok(Finding::Clean) => ExitCode::SUCCESS,
        Ok(Finding::Found) => ExitCode::from(EXIT_FOUND),
        Err(error) => {
            eprintln!("valkeeper-replay: {error:#}");
            let usage = error.downcast_ref::<Error>().is_some_and(Error::is_usage);
            ExitCode::from(if usage { EXIT_USAGE } else { EXIT_ERROR })
        }
    }
}

fn run(command: CommandLine) -> anyhow::Result<Finding> {
    let CommandLine { journal, archive, cluster, output, verb } = command;
    if let Verb::Explain { code } = &verb {
        let codes = code.as_ref().map_or_else(|| Ok(explain::all()), |code| explain::explain(code))?;
        return answer(&codes, output);
    }
    let stream = open(&journal, archive.as_deref(), cluster.as_deref())?;
    for trouble in stream.troubles.iter().filter(|_| !matches!(verb, Verb::Verify { .. })) {
        eprintln!("valkeeper-replay: the journal is damaged: {trouble}");
    }
    let history = stream.history();
    match verb {
        Verb::Log(flags) => answer(&log::log(&history, &flags.filter()), output),
        Verb::Show { seq } => answer(&show::show(&history, seq)?, output),
        Verb::Verify { anchor, deep } => {
            let anchor = anchor.as_deref().map(verify::Anchor::read).transpose()?;
            let deep = deep.then(|| deep::deep(&stream));
            answer(&Verified { deep, ..verify::verify(&stream, anchor) }, output)
        }
        Verb::At { moment } => answer(&at::at(&history, moment)?, output),
        Verb::Diverge { mutate } => answer(&diverge::diverge(&history, mutate), output),
        Verb::Audit(Audit::Failover) => answer(&audit::failover::failovers(&history), output),
        Verb::Audit(Audit::Reshard) => answer(&audit::reshard::reshards(&history), output),
        Verb::Blame(Blame::Slot { slot }) => answer(&blame::slot(&history, slot)?, output),
        Verb::Why { subject } => answer(&why::why(&history, &subject)?, output),
        Verb::Export => {
            let Origin { folded, records } = stream.origin();
            print(&export::export(folded, records)).map(|()| Finding::Clean)
        }
        Verb::Explain { .. } => Ok(Finding::Clean),
    }
}

fn open(journal: &Path, archive: Option<&Path>, cluster: Option<&str>) -> anyhow::Result<Stream> {
    if journal == Path::new("-") && io::stdin().is_terminal() {
        return Err(Error::NoJournal.into());
    }
    let stream = source::select(source::load(journal)?, cluster)?;
    for other in &stream.namesakes {
        eprintln!(
            "valkeeper-replay: left out is an older journal of that name: {other}; --cluster and its uid choose it"
        );
    }
    Ok(match archive {
        Some(archive) => source::join(stream, archive)?,
        None => stream,
    })
}

fn answer(report: &impl Report, format: Format) -> anyhow::Result<Finding> {
    print(&render(report, format)?)?;
    Ok(report.finding())
}

/// A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write the answer"),
    }
}
