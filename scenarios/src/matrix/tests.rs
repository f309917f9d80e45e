use serde_json::json;
use tempfile::TempDir;

use super::*;

/// The directories of a matrix.
struct Matrix(TempDir);

impl Matrix {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn write(&self, kernel: &str, name: &str, content: &str) -> &Self {
        let path = self.0.path().join(kernel).join(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("mkdir");
        fs::write(path, content).expect("write");
        self
    }

    /// A kernel on which all is well.
    fn green(&self, kernel: &str) -> &Self {
        self.trials(kernel, &[("io::reads", "begun"), ("io::reads", "passed"), ("start::hangs", "gated")])
            .suite(kernel, &[("probe", Verdict::Pass)], true)
            .write(kernel, "release", &format!("{kernel}.9-amd64\n"))
            .write(kernel, "pieces", "1\n")
            .write(kernel, "trials/1/status", "0\n")
            .write(kernel, "seconds", "431\n")
            .write(kernel, "suite.status", "0\n")
    }

    fn trials(&self, kernel: &str, trials: &[(&str, &str)]) -> &Self {
        self.piece(kernel, 1, trials)
    }

    fn piece(&self, kernel: &str, piece: u32, trials: &[(&str, &str)]) -> &Self {
        let line = |&(trial, outcome): &(&str, &str)| {
            json!({"trial": trial, "outcome": outcome, "elapsed_ms": 400, "gate": "some-bug: it hangs"}).to_string()
        };
        let lines: Vec<_> = trials.iter().map(line).collect();
        self.write(kernel, &format!("trials/{piece}/trials.jsonl"), &(lines.join("\n") + "\n"))
    }

    fn suite(&self, kernel: &str, parts: &[(&str, Verdict)], whole: bool) -> &Self {
        let part = |&(name, verdict): &(&str, Verdict)| {
            json!({
                "name": name, "verdict": verdict, "exit_code": 0, "elapsed_ms": 12_345, "what": "42 ops",
                "evidence": {}, "gates": ["killed in DEL: del-bug: it oopses (fixed: 8.0)"], "steps": [],
                "report": null, "repro": "ublk-torture probe --seed 7",
            })
        };
        let parts: Vec<_> = parts.iter().map(part).collect();
        let report = json!({
            "kernel": kernel, "seed": 7, "whole": whole, "planned": 1, "parts": parts, "left_out": [], "stopped": null,
        });
        self.write(kernel, "suite/suite.json", &report.to_string())
    }

    fn columns(&self, kernels: &[&str]) -> Vec<Column> {
        kernels.iter().map(|kernel| Column::read(&self.0.path().join(kernel)).expect("readable")).collect()
    }
}

#[test]
fn a_green_matrix_names_its_gates() {
    let matrix = Matrix::new();
    matrix.green("6.12").green("7.2");
    let columns = matrix.columns(&["6.12", "7.2"]);
    assert_eq!(exit_code(&columns), 0);
    let text = table(&columns).text();
    assert!(text.contains("6.12.9-amd64") && text.contains("pass 12.3 s, 1 gated: 42 ops"), "{text}");
    assert!(text.contains("trials io") && text.contains("1 passed, 0.8 s"), "{text}");
    assert!(text.lines().last().expect("a line").matches("green, 431.0 s").count() == 2, "{text}");
    let gates = gates(&columns);
    assert!(gates.contains(&"6.12: start::hangs: some-bug: it hangs".to_owned()), "{gates:?}");
    assert!(gates.contains(&"7.2: probe: killed in DEL: del-bug: it oopses (fixed: 8.0)".to_owned()), "{gates:?}");
    assert_eq!(problems(&columns), [""; 0]);
}

#[test]
fn a_kernel_that_cannot_be_had_is_named_and_is_no_pass() {
    let matrix = Matrix::new();
    matrix.green("7.2").write("9.9", "environment", "found no kernel 9.9\n");
    let columns = matrix.columns(&["7.2", "9.9"]);
    assert_eq!(exit_code(&columns), 4);
    assert!(table(&columns).text().contains("NOT HAD"));
    assert_eq!(problems(&columns), ["9.9: found no kernel 9.9"]);
}

#[test]
fn a_trial_that_does_not_end_is_a_failure() {
    let matrix = Matrix::new();
    matrix.green("7.2").trials("7.2", &[("io::reads", "begun"), ("io::reads", "passed"), ("io::hangs", "begun")]);
    let columns = matrix.columns(&["7.2"]);
    assert_eq!(exit_code(&columns), 2);
    assert_eq!(problems(&columns), ["7.2: io::hangs failed"]);
    assert!(table(&columns).text().contains("1 passed, 1 FAILED"));
}

#[test]
fn a_trial_that_passed_at_the_second_try_is_named() {
    let matrix = Matrix::new();
    for (first, name) in
        [(&[("io::reads", "begun"), ("io::reads", "failed")][..], "fails"), (&[("io::reads", "begun")], "ends")]
    {
        let again =
            [("io::reads", "begun"), ("io::reads", "passed"), ("io::writes", "begun"), ("io::writes", "passed")];
        matrix.green(name).trials(name, &[first, &again].concat());
        let columns = matrix.columns(&[name]);
        assert_eq!(exit_code(&columns), 0, "CI says how often it tries");
        let text = table(&columns).text();
        assert!(text.contains("2 passed, 1 FLAKY") && text.contains("1 FLAKY, 0 failed"), "{text}");
        assert_eq!(problems(&columns), [format!("{name}: io::reads failed, and passed when it was run again")]);
    }
}

#[test]
fn what_did_not_take_place_is_no_pass() {
    let matrix = Matrix::new();
    matrix.write("7.2", "release", "7.2.1\n");
    let columns = matrix.columns(&["7.2"]);
    assert_eq!(exit_code(&columns), 2);
    assert_eq!(problems(&columns).len(), 2);
    // A suite of one half.
    matrix.green("7.2").suite("7.2", &[("probe", Verdict::Pass)], false);
    let columns = matrix.columns(&["7.2"]);
    assert_eq!(exit_code(&columns), 2);
    assert!(problems(&columns)[0].contains("ended from outside"));
    // No trials at all.
    matrix.green("7.2").trials("7.2", &[]);
    assert_eq!(exit_code(&matrix.columns(&["7.2"])), 2);
}

#[test]
fn every_piece_of_the_trials_has_to_end_well() {
    let matrix = Matrix::new();
    matrix.green("7.2").write("7.2", "pieces", "3\n").piece(
        "7.2",
        3,
        &[("io::writes", "begun"), ("io::writes", "passed")],
    );
    matrix.write("7.2", "trials/3/status", "0\n");
    let columns = matrix.columns(&["7.2"]);
    assert_eq!(exit_code(&columns), 2);
    assert_eq!(problems(&columns), ["7.2: trials: did not take place, or did not end"]);
    assert!(table(&columns).text().contains("2 passed, 1.6 s"));
    matrix.write("7.2", "trials/2/status", "100\n");
    assert_eq!(problems(&matrix.columns(&["7.2"])), ["7.2: trials: ended with status 100"]);
    matrix.write("7.2", "trials/2/status", "0\n");
    assert_eq!(exit_code(&matrix.columns(&["7.2"])), 0);
}

#[test]
fn a_failing_scenario_comes_with_its_command() {
    let matrix = Matrix::new();
    matrix.green("7.2").green("6.12").suite("7.2", &[("probe", Verdict::Fail), ("fault", Verdict::Pass)], true);
    let columns = matrix.columns(&["6.12", "7.2"]);
    assert_eq!(exit_code(&columns), 2);
    let text = table(&columns).text();
    assert!(text.contains("FAIL 12.3 s") && text.contains("not run"), "{text}");
    assert!(problems(&columns)[0].contains("to see it again: ublk-torture probe --seed 7"));
    let page = page(&table(&columns), &gates(&columns), &problems(&columns));
    assert!(page.starts_with("|  | 6.12.9-amd64 | 7.2.9-amd64 |\n| --- |") && page.contains("Not well:"), "{page}");
}

#[test]
fn what_cannot_be_read_is_not_passed_over() {
    let matrix = Matrix::new();
    matrix.green("7.2").write("7.2", "suite/suite.json", "{");
    assert!(Column::read(&matrix.0.path().join("7.2")).is_err());
    assert!(Column::read(&matrix.0.path().join("nowhere")).is_err());
}
