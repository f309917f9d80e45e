//! The page of a failure.

use super::*;

#[test]
fn the_page_says_what_was_promised_and_how_to_see_it_again() {
    let found = check(|| Long(Arc::new(right()))).try_run().expect_err("it zeroes too much");
    let page = found.to_string();
    for words in [
        "a promise is broken: a read returns what was written last",
        "should hold  what step 1 wrote",
        "holds        zeroes: the last change left no trace",
        "1. worker 0 writes sectors",
        "2. worker 0 zeroes sectors",
        "<- shows it",
        "fails in ",
        &format!(".seed({})", found.seed()),
        "UBLKIT_CHECK_SEED=",
    ] {
        assert!(page.contains(words), "{words}:\n{page}");
    }
    assert!(page.lines().count() < 40 && page.lines().all(|line| line.chars().count() < 130), "{page}");
}
