//! HTTP as the hub speaks it: redirects to where the bytes lie, byte ranges, errors with a code.

use std::io::Read;
use std::time::Duration;

use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use crate::Error;

/// More redirects than any hub makes.
const MAX_REDIRECTS: usize = 10;
/// A connection on which nothing comes for so long is taken for dropped; the download goes on with another.
const SILENCE: Duration = Duration::from_secs(30);

/// Why a request gave no answer that can be used.
#[derive(Debug)]
pub(super) enum Failure {
    /// The hub said no: its status, and its own words.
    Status { code: u16, says: String, retry_after: Option<Duration> },
    /// There was no connection, or it ended.
    Network(String),
}

impl Failure {
    /// Whether asking again may help.
    pub fn is_passing(&self) -> bool {
        match self {
            Failure::Status { code, .. } => matches!(code, 408 | 429 | 500..),
            Failure::Network(_) => true,
        }
    }

    /// The error for the reader; `at`: what was asked for.
    pub fn explain(&self, at: String) -> Error {
        let error = Error::new("the download failed").at(at).expected("an answer from the hub");
        match self {
            Failure::Status { code, says, .. } => {
                let next = match code {
                    401 | 403 => {
                        "it is gated, private or does not exist: accept its licence on its page, then set HF_TOKEN or run `hf auth login`"
                    }
                    404 => "check the spelling of the id (owner/name), of the revision and of the file",
                    429 => "the hub asks for patience: wait some minutes; with a token (HF_TOKEN) more is allowed",
                    _ => "the hub has a problem: try again later; what was downloaded is kept",
                };
                error
                    .found(if says.is_empty() { format!("status {code}") } else { format!("status {code}: {says}") })
                    .next(next)
            }
            Failure::Network(what) => error
                .found(what.clone())
                .next("check the network; HF_ENDPOINT names a mirror; what was downloaded is kept, so try again"),
        }
    }
}

/// Asks the hub, and follows it to where it sends.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    token: Option<String>,
    /// Scheme, host and port to which the token may be shown.
    origin: String,
}

impl Client {
    /// A client of the hub at `endpoint`.
    pub fn new(endpoint: &str, token: Option<String>) -> Self {
        let config = Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("tunebook/", env!("CARGO_PKG_VERSION")))
            // A compressed answer has other byte ranges.
            .accept_encoding("identity")
            .build();
        let origin = origin(endpoint).unwrap_or_default();
        Client { agent: config.into(), token, origin }
    }

    /// The answer at `url`, from byte `start` on where that is above 0, with the headers of the first answer: those of the
    /// hub itself, where the last is a store's.
    pub fn get(&self, url: &str, start: u64) -> Result<(HeaderMap, Response<Body>), Failure> {
        let mut url = url.to_owned();
        let mut first = None;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if start > 0 {
                request = request.header("range", format!("bytes={start}-"));
            }
            // Nobody else may see it.
            if let Some(token) = &self.token
                && origin(&url).is_some_and(|o| o == self.origin)
            {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| Failure::Network(e.to_string()))?;
            let headers = first.get_or_insert_with(|| response.headers().clone());
            match response.status().as_u16() {
                200..=299 => return Ok((headers.clone(), response)),
                301 | 302 | 303 | 307 | 308 => url = redirected(&url, text(response.headers(), "location"))?,
                code => return Err(refused(code, response)),
            }
        }
        Err(Failure::Network(format!("more than {MAX_REDIRECTS} redirects")))
    }
}

/// A header's text; `""` when it is not there.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn refused(code: u16, response: Response<Body>) -> Failure {
    let headers = response.headers().clone();
    let retry_after = text(&headers, "retry-after").parse().ok().map(|s: u64| Duration::from_secs(s.min(60)));
    let mut says = [text(&headers, "x-error-code"), text(&headers, "x-error-message")].join(" ").trim().to_owned();
    if says.is_empty() {
        let mut start = vec![];
        _ = response.into_body().into_reader().take(200).read_to_end(&mut start);
        let start = String::from_utf8_lossy(&start);
        // An error page says nothing in its first 200 letters.
        says = if start.trim_start().starts_with('<') { String::new() } else { start.trim().to_owned() };
    }
    Failure::Status { code, says, retry_after }
}

/// `https://host:port` of an address.
fn origin(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next().filter(|a| !a.is_empty())?;
    Some(format!("{scheme}://{authority}").to_ascii_lowercase())
}

/// Where a redirect leads.
fn redirected(from: &str, location: &str) -> Result<String, Failure> {
    let bad = |why: &str| Failure::Network(format!("a redirect that {why}: `{location}`"));
    let base = origin(from).ok_or_else(|| bad("starts nowhere"))?;
    if location.starts_with("http://") && base.starts_with("https://") {
        return Err(bad("leaves encryption"));
    }
    if location.starts_with("http://") || location.starts_with("https://") {
        return Ok(location.to_owned());
    }
    if location.starts_with('/') && !location.starts_with("//") {
        return Ok(format!("{base}{location}"));
    }
    Err(bad("leads nowhere"))
}

/// A name as part of an address, slashes kept.
pub(super) fn escape(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out += &format!("%{byte:02X}");
        }
    }
    out
}
