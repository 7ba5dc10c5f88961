//! `bundle verify-export`: an export read back by a way of its own and compared with its bundle.

use std::borrow::Cow;
use std::path::Path;

use draftsmith_kernels::Kernels;
use draftsmith_model::Published;

use super::parallel::Parallel;
use super::{eagle3, parallel};
use crate::BundleError;
use crate::check::CheckReport;
use crate::layout::read_config;
use crate::manifest::{CONFIG_FILE, Manifest};

/// Compares an export with the bundle that it was made from: every tensor number by number, the captured layers, and
/// hidden state and logits of the bundle's probes, answered by a network that shares nothing with ours.
///
/// # Errors
/// Only if there is nothing to compare; what does not hold is in the report, which is named after the layout.
pub fn verify_export<K: Kernels>(
    export: &Path,
    bundle: &Path,
    kernels: &K,
) -> Result<CheckReport, BundleError> {
    let manifest = Manifest::read(bundle)?;
    let (_, config) = read_config(&bundle.join(CONFIG_FILE))
        .map_err(|problem| BundleError::draft(bundle, "compared", vec![problem]))?;
    let parallel = |draft: &Parallel<'_>| parallel::compare(export, bundle, &manifest, draft, kernels);
    let (layout, checks) = match config.published() {
        Published::Nowhere => {
            return Err(BundleError::NoLayout { method: config.name(), layout: "any" });
        }
        Published::Eagle3(config) => eagle3::compare(export, bundle, &manifest, config, kernels)?,
        Published::Block(block) => parallel(&Parallel::Block(Cow::Borrowed(block)))?,
        Published::PEagle(config) => parallel(&Parallel::PEagle(Cow::Borrowed(config)))?,
    };
    Ok(CheckReport::new(format!("{} ({} layout)", manifest.name, layout.name()), checks))
}
