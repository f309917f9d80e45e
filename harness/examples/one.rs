//! A trial from its seed, shrunk and told.
use ublkit_harness::script::Workload;
use ublkit_harness::seed::Seed;
use ublkit_harness::shrink::ShrinkOptions;
use ublkit_harness::sim::RunOptions;
use ublkit_harness::trial::*;
fn main() {
    let a: Vec<String> = std::env::args().skip(1).collect();
    let planted = (a[0] != "none").then(|| a[0].parse().unwrap());
    let trial = Trial::draw(Seed::new(a[1].parse().unwrap()), planted, Workload::everything(a[2].parse().unwrap()));
    let o = RunOptions::default();
    let t = trial.run(&o).unwrap();
    let Some(f) = t.ran.failure else {
        println!("passes");
        return;
    };
    println!("{:?} {} ops", f.oracle, f.after_ops);
    let s = trial.script(f.after_ops).unwrap();
    let s = shrink_on_simulator(s, &o, &ShrinkOptions::default(), &mut || true);
    println!("{}\n{} runs, rate {:?}", s.script.to_json(), s.runs, s.rate);
    let r = replay(&s.script, &RunOptions { record: true, ..o });
    for e in r.ran.events.iter().rev().take(60).rev() {
        println!("{e}");
    }
    println!("{:#?}", r.ran.failure.map(|f| f.event));
}
