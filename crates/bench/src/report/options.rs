//! What a report shows besides its records.

/// What a report shows besides its records.
#[derive(Clone, Debug, Default)]
pub struct ReportOptions {
    /// Heading; made from target and draft if `None`.
    pub title: Option<String>,
    /// How training went, if it is known.
    pub training: Option<TrainingCurve>,
    /// Whether the draft is worth using, in a paragraph.
    pub verdict: Option<String>,
}

/// Values over training. Estimated and measured ones are kept, and drawn, apart.
#[derive(Clone, Debug, Default)]
pub struct TrainingCurve {
    /// From the trainer's own accuracy: an estimate, not a measurement.
    pub sim_accept_len: Vec<TrainingPoint>,
    /// By real speculative decoding on held-out prompts.
    pub measured_accept_len: Vec<TrainingPoint>,
}

/// One value of a training curve.
#[derive(Clone, Copy, Debug)]
pub struct TrainingPoint {
    /// Optimiser step.
    pub step: u64,
    /// The value.
    pub value: f64,
    /// Ends of its 95 % interval, if it was measured on several rows.
    pub interval: Option<crate::Interval>,
    /// Rows behind it.
    pub rows: usize,
}
