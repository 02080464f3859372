use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn the_socket_may_stand_before_or_after_the_subcommand() {
    for line in ["lodestream --socket /s --json ls", "lodestream ls --json --socket /s"] {
        let cli = parse(line).unwrap();
        assert_eq!((cli.socket.as_deref(), cli.json), (Some("/s"), true), "{line}");
    }
    for line in ["lodestream --socket /s serve", "lodestream serve --socket /s"] {
        let Command::Serve(args) = parse(line).unwrap().command else { panic!("{line}") };
        assert_eq!(args.socket.as_deref(), Some("/s"), "{line}");
    }
}

#[test]
fn what_makes_no_sense_is_a_usage_error() {
    for line in [
        "lodestream",
        "lodestream prefetch",
        "lodestream prefetch m --deadline soon",
        "lodestream prefetch m --select x:0:8:8",
        "lodestream attach",
        "lodestream jobs --wait",
        "lodestream jobs 1 --wait --cancel",
        "lodestream completions cmd",
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), i32::from(Code::CliUsage.class().exit_code()), "{line}");
    }
}
