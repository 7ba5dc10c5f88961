//! The kernels through the host shim, against the checks that every implementation must pass; and the shim itself
//! against kernels that are wrong.

use std::path::Path;

use draftsmith_cuda::shim::Shim;
use draftsmith_cuda::{Arg, At, Cuda, CudaError, CudaOptions, Launch, Launcher, Operands, source};
use draftsmith_kernels::train::{AdamStep, LinearShape, SoftLoss, SoftScale, Teacher};
use draftsmith_kernels::{Memory, TrainKernels, testing};

/// What a bf16 of 8 significant bits loses in operands of products.
const BF16: f64 = 2e-2;

/// Where compiled shims are kept.
fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn device(operands: Operands) -> Cuda<Shim> {
    Cuda::new(Shim::new(folder()).unwrap(), CudaOptions { operands, ..CudaOptions::default() })
}

#[test]
fn linear_layers_equal_the_sums() {
    testing::train::linear(&device(Operands::F32), 0.0);
    testing::train::linear(&device(Operands::Bf16), BF16);
}

#[test]
fn row_wise_operations_equal_the_formulas() {
    let k = device(Operands::F32);
    testing::train::norm(&k, 0.0);
    testing::train::rotation(&k, 0.0);
    testing::train::copies(&k);
    testing::train::cells(&k, 0.0);
    testing::train::adamw(&k);
}

#[test]
fn gating_equals_the_formulas() {
    testing::train::gating(&device(Operands::F32), 0.0);
}

#[test]
fn attention_of_training_time_tests_equals_the_dense_mask() {
    testing::train::attention(&device(Operands::F32), 0.0);
}

#[test]
fn attention_of_blocks_equals_the_dense_mask() {
    testing::train::spans(&device(Operands::F32), 0.0);
}

#[test]
fn losses_equal_the_formulas() {
    let k = device(Operands::F32);
    testing::train::loss(&k, 0.0);
    testing::train::token_loss(&k, 0.0);
}

#[test]
fn losses_in_chunks_of_rows_equal_the_formulas() {
    // Less than a row: one row at a time.
    for logits in [1, 100] {
        let options = CudaOptions { operands: Operands::F32, logits, ..CudaOptions::default() };
        let k = Cuda::new(Shim::new(folder()).unwrap(), options);
        testing::train::token_loss(&k, 0.0);
    }
    let options = CudaOptions { operands: Operands::F32, logits: 4000, ..CudaOptions::default() };
    testing::train::loss(&Cuda::new(Shim::new(folder()).unwrap(), options), 0.0);
}

#[test]
fn attention_of_every_head_width_equals_the_cpus() {
    testing::train::head_widths(&device(Operands::F32), 0.0);
}

#[test]
fn attention_in_the_tensor_cores_equals_the_formulas_within_its_rounding() {
    let k = device(Operands::Bf16);
    testing::train::attention(&k, BF16);
    testing::train::spans(&k, BF16);
    testing::train::head_widths(&k, BF16);
}

#[test]
fn losses_with_rounded_operands_equal_the_formulas_within_that_rounding() {
    let k = device(Operands::Bf16);
    testing::train::loss(&k, BF16);
    testing::train::token_loss(&k, BF16);
}

/// Launches a kernel over one buffer of `values` floats and an array of the same size that is never written.
fn run(
    kernels: &str,
    kernel: &'static str,
    values: usize,
    grid: (usize, usize),
    threads: u32,
) -> Result<(), String> {
    let shim = Shim::of(folder(), &format!("{}{kernels}", source::FILES[0].1), u64::MAX).unwrap();
    let memory = shim.allocate(values * 4).unwrap();
    let at = At::new(&memory, 0);
    shim.write(at, &vec![0; values * 4]).unwrap();
    let args = [Arg::Buffer(Some(at)), Arg::I32(values as i32)];
    let launch = shim.ready(Launch { kernel, grid, threads, args: &args }).unwrap();
    match shim.start(&launch) {
        Ok(()) => Ok(()),
        Err(CudaError::Call { reason, .. }) => Err(reason),
        Err(other) => panic!("{other}"),
    }
}

/// Kernels that are right, or wrong in one way each.
const KERNELS: &str = r#"
KERNEL(right, OUT(float) x, int count) {
    SHARED(float, room, 64);
    room[THREAD] = (float)THREAD;
    SYNC();
    float value = room[63 - THREAD];
    SYNC();
    room[THREAD] = value + LANE_XOR(value, 1);
    if (BLOCK_X * THREADS + THREAD < count) x[BLOCK_X * THREADS + THREAD] = room[THREAD];
}
KERNEL(outside, OUT(float) x, int count) { x[BLOCK_X * THREADS + THREAD] = 1.0f; }
KERNEL(before, OUT(float) x, int count) { x[(i64)THREAD - 1] = 1.0f; }
KERNEL(read_outside, OUT(float) x, int count) {
    float value = x[count];
    if (value == 1.0f) x[0] = value;
}
KERNEL(no_barrier, OUT(float) x, int count) {
    SHARED(float, room, 64);
    room[THREAD] = 1.0f;
    x[THREAD] = room[63 - THREAD];
}
KERNEL(late_write, OUT(float) x, int count) {
    SHARED(float, room, 64);
    room[THREAD] = 1.0f;
    SYNC();
    float value = room[63 - THREAD];
    room[THREAD] = value;
}
KERNEL(two_writers, OUT(float) x, int count) { x[THREAD / 2] = 1.0f; }
KERNEL(two_blocks, OUT(float) x, int count) { x[THREAD] = 1.0f; }
KERNEL(reads_of_another_block, OUT(float) x, int count) {
    if (BLOCK_X == 0) x[THREAD] = 1.0f;
    else { float value = x[THREAD]; x[64 + THREAD] = value; }
}
KERNEL(unwritten, OUT(float) x, int count) {
    SHARED(float, room, 64);
    if (THREAD < 32) room[THREAD] = 1.0f;
    SYNC();
    x[THREAD] = room[THREAD];
}
KERNEL(half_a_barrier, OUT(float) x, int count) {
    if (THREAD < 32) SYNC();
    x[THREAD] = 1.0f;
}
KERNEL(other_barrier, OUT(float) x, int count) {
    if (THREAD < 32) SYNC();
    if (THREAD >= 32) {
        SYNC();
    }
    x[THREAD] = 1.0f;
}
KERNEL(half_a_warp, OUT(float) x, int count) {
    float value = 1.0f;
    if (THREAD % 2 == 0) value = LANE_XOR(value, 2);
    x[THREAD] = value;
}
KERNEL(much_shared, OUT(float) x, int count) {
    SHARED(float, room, 12289);
    room[THREAD] = 1.0f;
}
"#;

#[test]
fn the_shim_finds_what_is_wrong_with_a_kernel_and_nothing_in_a_right_one() {
    assert_eq!(run(KERNELS, "right", 100, (2, 1), 64), Ok(()));
    for (kernel, values, blocks, wanted) in [
        ("outside", 100, 2, "element at byte 400 of a buffer of 400 bytes"),
        ("before", 64, 1, "element at byte -4 of a buffer"),
        ("read_outside", 64, 1, "element at byte 256 of a buffer of 256 bytes"),
        ("no_barrier", 64, 1, "shared memory at byte 252 is read before it is written"),
        ("late_write", 64, 1, "race"),
        ("two_writers", 64, 1, "race"),
        ("two_blocks", 64, 2, "race"),
        ("reads_of_another_block", 128, 2, "race"),
        ("unwritten", 64, 1, "shared memory at byte 128 is read before it is written"),
        ("half_a_barrier", 64, 1, "32 of 64 threads reached a barrier, 32 ended"),
        ("other_barrier", 64, 1, "barriers of different lines"),
        ("half_a_warp", 64, 1, "wait for their warp"),
        ("much_shared", 64, 1, "49156 bytes of shared memory"),
        ("nowhere", 64, 1, "no kernel `nowhere`"),
    ] {
        let error = run(KERNELS, kernel, values, (blocks, 1), 64).expect_err(kernel);
        assert!(error.contains(wanted), "{kernel}: {error}");
    }
    let shim = Shim::of(folder(), &format!("{}{KERNELS}", source::FILES[0].1), u64::MAX).unwrap();
    let memory = shim.allocate(256).unwrap();
    let place = Arg::Buffer(Some(At::new(&memory, 0)));
    let wrong = |args: &[Arg<'_, _>]| {
        let launch = Launch { kernel: "right", grid: (1, 1), threads: 64, args };
        shim.start(&shim.ready(launch).unwrap()).unwrap_err().to_string()
    };
    assert!(wrong(&[place]).contains("right takes 2 arguments, not 1"));
    let place = Arg::Buffer(Some(At::new(&memory, 0)));
    assert!(wrong(&[place, Arg::I64(1)]).contains("argument 1 has 4 bytes, not 8"));
    assert!(wrong(&[Arg::Buffer(None), Arg::I32(64)]).contains("a null buffer is used"));
    assert!(wrong(&[Arg::Buffer(Some(At::new(&memory, 2))), Arg::I32(64)]).contains("no place for"));
}

#[test]
fn mistakes_in_our_own_kernels_are_found() {
    // A barrier less, a bound off by one, a sum over the wrong lanes: each in a copy of the source.
    for (right, wrong) in [
        (
            "    if (THREAD % 32 == 0) room[THREAD / 32] = value;\n    SYNC();",
            "    if (THREAD % 32 == 0) room[THREAD / 32] = value;",
        ),
        ("    if (c >= width) return;", "    if (c > width) return;"),
        ("if (row < count && c < width) value", "if (row <= count && c < width) value"),
        ("load_rows<D>(part ? vo : vc, key, count, N", "load_rows<D>(part ? vo : vc, key, N, N"),
        (
            "for (int mask = 16; mask > 0; mask >>= 1) value += ",
            "for (int mask = 8; mask > 0; mask >>= 1) value += ",
        ),
        ("bool seen = at >= seen_from && at < seen_to;", "bool seen = at >= seen_from && at <= seen_to;"),
    ] {
        let text = source::text();
        assert!(text.contains(right), "{right}");
        let shim = Shim::of(folder(), &text.replacen(right, wrong, 1), u64::MAX).unwrap();
        let k = Cuda::new(shim, CudaOptions { operands: Operands::F32, ..CudaOptions::default() });
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            testing::train::norm(&k, 0.0);
            testing::train::attention(&k, 0.0);
        }));
        assert!(found.is_err(), "{wrong}");
    }
}

#[test]
fn memory_that_runs_out_names_what_was_asked_for_and_what_is_free() {
    let shim = Shim::of(folder(), &source::text(), 1 << 20).unwrap();
    let k = Cuda::new(shim, CudaOptions::default());
    assert_eq!(k.reserve(1 << 19), Ok(()));
    // What lies in the pool is given back before a request fails.
    assert_eq!(k.reserve(1 << 20), Ok(()));
    let error = k.reserve(3 << 20).unwrap_err();
    assert_eq!(error.to_string(), "3.0 MiB of memory were asked for on the GPU, 1.0 MiB of 1.0 MiB are free");
    assert!(error.hint().contains("train.pack_length"), "{}", error.hint());
    // From inside an operation it arrives as the same words, without a panic.
    let failure = draftsmith_kernels::catch_failure(|| k.zeros(1 << 20)).err().expect("not enough");
    assert_eq!(failure.message, "4.0 MiB of memory were asked for on the GPU, 1.0 MiB of 1.0 MiB are free");
    assert_eq!(failure.hint, error.hint());
    // What fits goes on.
    assert_eq!(testing::host(&k, &k.zeros(4), 4), [0.0; 4]);
}

#[test]
fn the_same_call_gives_the_same_bits() {
    let k = device(Operands::Bf16);
    let (rows, vocab, width) = (9, 300, 16);
    let shape = LinearShape { rows, out: vocab, inp: width };
    let (x, head) = (k.upload(&testing::noise(1, rows * width)), k.upload(&testing::noise(2, vocab * width)));
    let run = || {
        let mut p = k.scratch(rows * vocab);
        let mass = k.soft_targets(&x, &head, shape, &vec![5.0; rows], &mut p);
        let teacher = Teacher { p, mass, labels: vec![3; rows] };
        let (mut dx, mut dw) = (k.zeros(rows * width), k.zeros(vocab * width));
        let chosen: Vec<u32> = (0..rows as u32).collect();
        let scale = SoftScale { kl: 1.0, alpha: 1.0 };
        let grads = Some((&mut dx, &mut dw));
        k.linear_soft_ce(&x, &head, shape, &teacher, &chosen, SoftLoss::LkAlpha, scale, grads).get();
        (testing::host(&k, &dx, rows * width), testing::host(&k, &dw, vocab * width))
    };
    assert!(run() == run());
}

#[test]
fn the_rounded_copy_of_a_weight_follows_its_optimiser_step() {
    let k = device(Operands::Bf16);
    let shape = LinearShape { rows: 1, out: 1, inp: 2 };
    let (x, mut w) = (k.upload(&[1.0, 1.0]), k.upload(&[1.0, 2.0]));
    let mut y = k.zeros(1);
    k.linear(&x, &w, shape, &mut y);
    assert_eq!(testing::host(&k, &y, 1), [3.0]);
    let step =
        AdamStep { lr: 0.5, beta1: 0.9, beta2: 0.999, eps: 0.0, weight_decay: 0.0, grad_scale: 1.0, step: 1 };
    let (mut m, mut v) = (k.zeros(2), k.zeros(2));
    k.adamw(step, 2, &mut w, &k.upload(&[1.0, -1.0]), (&mut m, &mut v));
    k.linear(&x, &w, shape, &mut y);
    // 1 - 0.5 and 2 + 0.5
    assert_eq!(testing::host(&k, &w, 2), [0.5, 2.5]);
    assert_eq!(testing::host(&k, &y, 1), [3.0]);
    // One that is written anew has no old copy, and a step over a part of it keeps none of the rest.
    k.write(&mut w, &[4.0, 8.0]);
    k.linear(&x, &w, shape, &mut y);
    assert_eq!(testing::host(&k, &y, 1), [12.0]);
    k.adamw(step, 1, &mut w, &k.upload(&[1.0, -1.0]), (&mut m, &mut v));
    k.linear(&x, &w, shape, &mut y);
    let now = testing::host(&k, &w, 2);
    assert_eq!(testing::host(&k, &y, 1), [half_of(now[0]) + half_of(now[1])]);
}

fn half_of(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}
