//! The draftsmith binary: parse, resolve, run, report.

mod failure;
mod printer;
mod signals;
mod verbs;

use std::process::ExitCode;

use clap::Parser;
use draftsmith::cli::{BenchVerb, BundleVerb, Cli, DataVerb, DoctorVerb, Verb};
use draftsmith::formats::run::Stage;

use crate::failure::Failure;
use crate::verbs::Session;

fn main() -> ExitCode {
    failure::report_panics();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::from_clap(&error),
    };
    let session = match Session::new(&cli) {
        Ok(session) => session,
        Err(failure) => return failure.print(),
    };
    match run(cli, &session) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => session.fail(failure),
    }
}

fn run(mut cli: Cli, session: &Session) -> Result<u8, Failure> {
    // Whatever verb asks for a bundle is handed its folder.
    for bundle in cli.verb.bundles_mut() {
        *bundle = session.bundle(bundle)?;
    }
    match cli.verb {
        Verb::Doctor(args) => match &args.verb {
            Some(DoctorVerb::ServeGap(args)) => verbs::serve_gap::run(args, session),
            None if args.draft.is_some() => verbs::doctor_draft::run(&args, session),
            None => verbs::doctor::run(&args, session),
        },
        Verb::List(args) => verbs::list::run(&args, session),
        Verb::Pull(args) => verbs::pull::run(&args, session),
        Verb::Push(args) => verbs::push::run(&args, session),
        Verb::Data(args) => match args.verb {
            DataVerb::Prepare(args) => {
                verbs::stages::advance("data prepare", &args.run, Some(Stage::Data), session)
            }
            DataVerb::Preview(args) => verbs::data::preview(&args, session),
            DataVerb::Render(args) => verbs::data::render(&args, session),
        },
        Verb::Regenerate(args) => {
            verbs::stages::advance("regenerate", &args.run, Some(Stage::Regenerate), session)
        }
        Verb::Capture(args) => verbs::stages::capture(&args, session),
        Verb::Train(args) => verbs::stages::advance("train", &args.run, Some(Stage::Train), session),
        Verb::Bundle(args) => match args.verb {
            BundleVerb::Make(args) => {
                verbs::stages::advance("bundle make", &args.run, Some(Stage::Bundle), session)
            }
            BundleVerb::Check(args) => verbs::bundle::check(&args, session),
            BundleVerb::Export(args) => verbs::bundle::export(&args, session),
            BundleVerb::VerifyExport(args) => verbs::bundle::verify_export(&args),
            BundleVerb::Import(args) => verbs::bundle::import(&args, session),
            BundleVerb::Card(args) => verbs::bundle::card(&args, session),
        },
        Verb::Make(args) => verbs::make::make(&args, session),
        Verb::Init(args) => verbs::make::init(&args.making, session),
        Verb::Run(args) if args.plan => verbs::stages::plan_run(&args, session),
        Verb::Run(args) => verbs::stages::advance("run", &args.run, None, session),
        Verb::Status(args) => verbs::status::run(&args, session),
        Verb::Inspect(args) => verbs::inspect::run(&args, session),
        Verb::Generate(args) => verbs::generate::run(&args, session),
        Verb::Bench(args) => match &args.verb {
            Some(BenchVerb::Kernels(args)) => verbs::bench::kernels(args, session),
            Some(BenchVerb::Decode(args)) => verbs::bench_decode::run(args, session),
            Some(BenchVerb::Identity(args)) => verbs::bench_identity::run(args, session),
            Some(BenchVerb::Tune(args)) => verbs::bench_tune::run(args, session),
            Some(BenchVerb::Compare(args)) => verbs::bench_compare::run(args, session),
            Some(BenchVerb::Train(args)) => verbs::bench_train::run(args, session),
            None => verbs::bench::workloads(&args, session),
        },
        Verb::Completions(args) => verbs::shell::completions(&args),
        Verb::Man(args) => verbs::shell::man(&args),
        Verb::Serve(args) => verbs::serve::run(&args, session),
        Verb::Quickstart(args) => verbs::quickstart::run(&args, session),
    }
}
