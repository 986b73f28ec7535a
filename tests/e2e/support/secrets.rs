//! Secrets that must be nowhere: every spelling in which one could get into a text, and the search for them.

use anyhow::{Context, bail};
use k8s_openapi::{
    ByteString,
    api::core::v1::{Pod, Secret},
};
use kube::{Api, Client, ResourceExt, api::ListParams};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Read,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Bytes of a private key of the curve P-256.
const SCALAR_BYTES: usize = 32;
/// Characters of a line of PEM.
const PEM_LINE_CHARS: usize = 64;
/// What comes before the private key in its PKCS #8 form: the version of the inner structure, and the head of the text of 32 bytes.
const BEFORE_SCALAR: [u8; 5] = [2, 1, 1, 4, 32];
/// Least characters of a spelling that no other text has by chance: 12 characters of base64 are 72 bits.
const SPELLING_CHARS_MIN: usize = 12;

/// One secret, in every spelling that is looked for.
pub struct Marker {
    /// Whose it is.
    pub name: String,
    /// How it is spelled, and the text.
    pub spellings: Vec<(&'static str, String)>,
}

impl Marker {
    /// A password.
    pub fn of_text(name: &str, text: &str) -> anyhow::Result<Marker> {
        let json = json_escaped(text)?;
        let mut spellings = vec![
            ("plain", text.to_owned()),
            ("URL-escaped", url_escaped(text, |byte| format!("%{byte:02X}"))),
            ("URL-escaped in small letters", url_escaped(text, |byte| format!("%{byte:02x}"))),
            ("JSON-escaped", json.clone()),
            ("JSON-escaped twice", json_escaped(&json)?),
            (
                "JSON-escaped for HTML",
                json.replace('&', "\\u0026").replace('<', "\\u003c").replace('>', "\\u003e"),
            ),
        ];
        spellings.extend(bytes_spelled(text.as_bytes())?);
        Marker::of(name, spellings)
    }

    /// A private key in PEM. Its public half is no secret, and stands in certificates: only the private one is looked for.
    pub fn of_key(name: &str, pem: &str) -> anyhow::Result<Marker> {
        let lines: Vec<&str> = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let der = from_base64(&lines.concat())?;
        let at = der.windows(BEFORE_SCALAR.len()).position(|window| window == BEFORE_SCALAR);
        let first = at.with_context(|| format!("{name} is no key of P-256"))? + BEFORE_SCALAR.len();
        let scalar = der.get(first..first + SCALAR_BYTES).context("a short key")?;
        let mut spellings = bytes_spelled(scalar)?;
        // As text it is broken into lines.
        let (begin, end) = ((first * 4).div_ceil(3), (first + SCALAR_BYTES) * 4 / 3);
        let parts = [(begin, PEM_LINE_CHARS.min(end)), (PEM_LINE_CHARS.max(begin), end)];
        for (begin, end) in parts {
            let part = lines.concat().get(begin..end).map(str::to_owned).unwrap_or_default();
            if part.len() >= SPELLING_CHARS_MIN {
                spellings.extend(bytes_spelled(part.as_bytes())?);
                spellings.push(("PEM", part));
            }
        }
        Marker::of(name, spellings)
    }

    fn of(name: &str, mut spellings: Vec<(&'static str, String)>) -> anyhow::Result<Marker> {
        let mut known = BTreeSet::new();
        spellings.retain(|(_, text)| known.insert(text.clone()));
        match spellings.iter().find(|(_, text)| text.len() < SPELLING_CHARS_MIN) {
            Some((how, text)) => bail!("{name}, {how}: {} characters say nothing", text.len()),
            None => Ok(Marker { name: name.to_owned(), spellings }),
        }
    }

    /// How it is spelled in a text, if it is there.
    pub fn is_in(&self, text: &str) -> Option<&'static str> {
        self.spellings.iter().find(|(_, spelling)| text.contains(spelling.as_str())).map(|(how, _)| *how)
    }
}

/// Base64 at every alignment, hex in both cases, and numbers as Rust shows bytes.
fn bytes_spelled(bytes: &[u8]) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut spellings = Vec::new();
    for (shift, how) in ["base64", "base64 shifted by one", "base64 shifted by two"].into_iter().enumerate() {
        let all = to_base64(&[vec![0; shift], bytes.to_vec()].concat())?;
        // Only the characters that are made of nothing but the secret's bits.
        let (begin, end) = ((shift * 8).div_ceil(6), (shift + bytes.len()) * 8 / 6);
        let inner = all.get(begin..end).context("base64 is shorter than it can be")?.to_owned();
        spellings.push(("base64 for URLs", inner.replace('+', "-").replace('/', "_")));
        spellings.push((how, inner));
    }
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    spellings.push(("hex in capitals", hex.to_uppercase()));
    spellings.push(("hex", hex));
    let numbers: Vec<String> = bytes.iter().map(u8::to_string).collect();
    spellings.push(("numbers", numbers.join(", ")));
    spellings.push(("numbers without spaces", numbers.join(",")));
    Ok(spellings)
}

fn json_escaped(text: &str) -> anyhow::Result<String> {
    let quoted = serde_json::to_string(text)?;
    Ok(quoted.trim_start_matches('"').strip_suffix('"').unwrap_or(&quoted).to_owned())
}

fn url_escaped(text: &str, escaped: fn(u8) -> String) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { escaped(byte) }).collect()
}

/// By the code that writes Secrets.
fn to_base64(bytes: &[u8]) -> anyhow::Result<String> {
    let text = serde_json::to_value(ByteString(bytes.to_vec()))?;
    Ok(text.as_str().unwrap_or_default().to_owned())
}

fn from_base64(text: &str) -> anyhow::Result<Vec<u8>> {
    Ok(serde_json::from_value::<ByteString>(serde_json::Value::from(text))?.0)
}

/// A marker for everything secret in a Secret of the operator's making: passwords and private keys.
pub async fn markers_of(client: &Client, namespace: &str, name: &str) -> anyhow::Result<Vec<Marker>> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let mut markers = Vec::new();
    for (key, ByteString(bytes)) in api.get(name).await?.data.unwrap_or_default() {
        let (text, name) = (String::from_utf8(bytes)?, format!("{key} of Secret {namespace}/{name}"));
        if key.ends_with("password") {
            markers.push(Marker::of_text(&name, &text)?);
        } else if key.ends_with(".key") {
            markers.push(Marker::of_key(&name, &text)?);
        }
    }
    if markers.is_empty() {
        bail!("Secret {namespace}/{name} has no password and no key")
    } else {
        Ok(markers)
    }
}

/// Logs of containers as the nodes keep them, held open so that what was written is there when the pod is not any more.
pub struct LogFiles {
    folders: Vec<PathBuf>,
    open: BTreeMap<(u64, u64), (PathBuf, File)>,
}

impl LogFiles {
    /// The logs of namespaces' pods on every node of the local cluster.
    pub fn of(namespaces: &[&str]) -> anyhow::Result<LogFiles> {
        let log = std::env::var_os("AUDIT_LOG").context("AUDIT_LOG is not set")?;
        let state = Path::new(&log).parent().context("AUDIT_LOG is in no folder")?.to_owned();
        let mut folders = Vec::new();
        for entry in fs::read_dir(&state)? {
            let folder = entry?.path().join("pod-logs");
            folders.extend(
                folder.is_dir().then(|| namespaces.iter().map(|one| folder.join(one))).into_iter().flatten(),
            );
        }
        if folders.is_empty() {
            bail!("no logs below {}", state.display())
        } else {
            Ok(LogFiles { folders, open: BTreeMap::new() })
        }
    }

    /// Opens what is there by now.
    pub fn look(&mut self) -> anyhow::Result<()> {
        for prefix in &self.folders {
            let (folder, wanted) = (
                prefix.parent().context("no folder")?,
                format!("{}_", prefix.file_name().unwrap_or_default().to_string_lossy()),
            );
            for pod in fs::read_dir(folder)?.filter_map(Result::ok) {
                if !pod.file_name().to_string_lossy().starts_with(&wanted) {
                    continue;
                }
                for container in fs::read_dir(pod.path()).into_iter().flatten().filter_map(Result::ok) {
                    for log in fs::read_dir(container.path()).into_iter().flatten().filter_map(Result::ok) {
                        // One that was just removed or packed has been opened before.
                        let Ok(file) = File::open(log.path()) else { continue };
                        let known = file.metadata()?;
                        self.open.entry((known.dev(), known.ino())).or_insert_with(|| (log.path(), file));
                    }
                }
            }
        }
        Ok(())
    }

    /// Everything in them so far.
    pub fn read(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut texts = Vec::new();
        for (path, file) in self.open.values() {
            let mut bytes = vec![0; usize::try_from(file.metadata()?.len())?];
            file.read_exact_at(&mut bytes, 0).with_context(|| path.display().to_string())?;
            texts.push((path.display().to_string(), String::from_utf8_lossy(&bytes).into_owned()));
        }
        Ok(texts)
    }
}

/// UIDs of a namespace's pods.
pub async fn pods_of(client: &Client, namespace: &str) -> anyhow::Result<Vec<String>> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    Ok(api.list(&ListParams::default()).await?.items.iter().filter_map(ResourceExt::uid).collect())
}

/// A file's text, with what is no text replaced.
pub fn text_of(path: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
