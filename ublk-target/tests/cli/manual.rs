//! Manual pages and completions: what packages take from the program.

use crate::harness::*;
use std::{collections::BTreeSet, fs, process::Command};

/// The commands that the help names.
fn commands(f: &Folder) -> BTreeSet<String> {
    let help = String::from_utf8(f.run("--help").expect(DONE).out).unwrap();
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // A line that is wrapped goes on further right.
    let words = lines.filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')));
    words.map(|words| words.split(' ').next().unwrap().to_owned()).filter(|name| name != "help").collect()
}

#[test]
fn each_command_has_a_page_with_an_example() {
    let f = Folder::new();
    fs::create_dir(f.path("man")).unwrap();
    f.run("manual man").expect(DONE);
    let commands = commands(&f);
    assert!(commands.len() > 15 && commands.contains("metrics"), "{commands:?}");
    let pages: BTreeSet<_> =
        fs::read_dir(f.path("man")).unwrap().map(|page| page.unwrap().file_name().into_string().unwrap()).collect();
    let mut wanted: BTreeSet<_> = commands.iter().map(|command| format!("ublk-integrity-{command}.8")).collect();
    wanted.insert("ublk-integrity.8".into());
    // Two of them have others below them.
    wanted.extend(["add", "change", "list", "remove"].map(|verb| format!("ublk-integrity-key-{verb}.8")));
    let verbs = ["init", "show", "reset", "move", "remove"];
    wanted.extend(verbs.map(|verb| format!("ublk-integrity-anchor-{verb}.8")));
    assert_eq!(pages, wanted);
    for page in &pages {
        let text = fs::read_to_string(f.path("man").join(page)).unwrap();
        for part in
            [".TH ", ".SH NAME", ".SH SYNOPSIS", ".SH \"EXIT STATUS\"", ".SH EXAMPLES", ".SH FILES", ".SH \"SEE ALSO\""]
        {
            assert!(text.contains(part), "{page} has no {part}");
        }
        assert!(!text.contains("udev\\-probe"), "{page} names what is for programs");
    }
    let format = fs::read_to_string(f.path("man/ublk-integrity-format.8")).unwrap();
    assert!(format.contains("\\-\\-assume\\-atomic"), "{format}");
    f.run("manual nowhere").expect(DEVICE).says("nowhere");
}

#[test]
fn the_page_of_the_table_has_its_options() {
    let (page, guide) =
        (include_str!("../../../dist/man/ublk-integritytab.5"), include_str!("../../../docs/ublk-integritytab.md"));
    let page = page.replace("\\-", "-");
    let options = guide.split("**OPTIONS**").nth(1).unwrap().split("## Commands").next().unwrap();
    let words =
        options.split('`').skip(1).step_by(2).filter(|word| word.len() > 3 && word.is_ascii() && !word.contains("--"));
    for word in words {
        let name = word.split('=').next().unwrap();
        assert!(page.contains(name), "{name} is not in ublk-integritytab(5)");
    }
}

#[test]
fn shells_take_the_completions() {
    let f = Folder::new();
    for (shell, check) in [("bash", &["bash", "-n"][..]), ("zsh", &["zsh", "-n"]), ("fish", &["fish", "-n"])] {
        let text = f.run(&format!("completions {shell}")).expect(DONE).out;
        let words = String::from_utf8(text.clone()).unwrap();
        for word in ["metrics", "attach", "assume-atomic"] {
            assert!(words.contains(word), "{shell}: no {word}");
        }
        assert!(!words.contains("udev-probe"), "{shell} completes what is for programs");
        fs::write(f.path(shell), text).unwrap();
        // Where the shell is there it reads them.
        if let Ok(done) = Command::new(check[0]).args(&check[1..]).arg(f.path(shell)).output() {
            assert!(done.status.success(), "{shell}: {}", String::from_utf8_lossy(&done.stderr));
        }
    }
    f.run("completions tcsh").expect(ARGUMENTS).says("tcsh");
    f.run("completions").expect(ARGUMENTS);
}
