//! What a server needs from outside: leave to use the network, and its key.

use draftsmith_formats::run::is_local_address;
use draftsmith_pull::Places;

use crate::Error;

/// The key from the variable that a table names, if it names one.
///
/// # Errors
/// The network is switched off and the server is elsewhere, or the variable is not set.
pub fn server_key(
    url: &str,
    key_env: Option<&str>,
    places: &Places,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, Error> {
    if places.offline && !is_local_address(url) {
        return Err(Error::input(
            format!("`{url}` is elsewhere, but the network is switched off"),
            "leave `--offline` (or HF_HUB_OFFLINE) out, or use a server on this machine",
        ));
    }
    let Some(name) = key_env else { return Ok(None) };
    match variable(name).filter(|key| !key.trim().is_empty()) {
        Some(key) => Ok(Some(key.trim().to_string())),
        None => Err(Error::input(
            format!("the key of `{url}` is to be in the variable `{name}`, which is not set"),
            format!("set it: `export {name}=…`"),
        )),
    }
}

/// The same for all servers of a table, which share one key.
///
/// # Errors
/// Those of [`server_key`], for the first address that has one.
pub fn server_keys(
    urls: &[&str],
    key_env: Option<&str>,
    places: &Places,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<String>, Error> {
    let mut key = None;
    for url in urls {
        key = server_key(url, key_env, places, &variable)?;
    }
    Ok(key)
}
