//! A bucket as it answers over HTTP: a small S3 on loopback. And a directory, and everything that is refused before.

use super::{
    settings::{RETRIES_MAX, SECRET_CHARS_MIN, SETTING_BYTES_MAX, WHY_CHARS_MAX},
    *,
};
use crate::pki::Certified;
use axum::{
    Router,
    body::{Bytes, to_bytes},
    extract::{Request, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    os::unix::fs::symlink,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};
use tokio::net::TcpListener;
use valkeeper_core::{
    event::{BaselineOrigin, Event, Record},
    ids::{MemberId, Seq, Timestamp, WriterEpoch},
    observation::Observed,
};
use valkeeper_journal::{
    Hash, Stored, StreamId,
    archive::{Archive, ArchiveError, Branch},
};

const ACCESS_KEY: &str = "AKIAIOSFODNN7EXAMPLE";
const SECRET_KEY: &str = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";

/// Names on a page of a listing: few, so that there are several pages.
const PAGE: usize = 2;

/// Bounds of the tests, milliseconds each: a hang is over soon.
const HASTY: Limits = Limits {
    connect: Duration::from_millis(2_000),
    request: Duration::from_millis(500),
    retry: Duration::from_millis(5),
    call: Duration::from_millis(5_000),
    look: Duration::ZERO,
};

/// What the next request meets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// 503 with S3's words; nothing is done.
    SlowDown,
    /// 503, but it was done.
    DoneAndSlowDown,
    /// No answer ever; nothing is done.
    Hang,
    /// No answer ever, but it was done.
    DoneAndHang,
    /// 403, with everything in the body that the client sent.
    Forbidden,
    /// 409, as S3 says while another writer of the same name is at work.
    Busy,
}

#[derive(Default)]
struct Store {
    objects: BTreeMap<String, Bytes>,
    faults: VecDeque<Fault>,
    puts: Vec<HeaderMap>,
    /// The access key that is not the usual one any more.
    rotated: Option<&'static str>,
}

type Shared = Arc<Mutex<Store>>;

fn status(code: StatusCode, s3_code: &str) -> Response {
    (code, format!("<Error><Code>{s3_code}</Code></Error>")).into_response()
}

async fn serve(State(store): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, 4 << 20).await.unwrap();
    let fault = store.lock().unwrap().faults.pop_front();
    let answer = match fault {
        None | Some(Fault::DoneAndHang | Fault::DoneAndSlowDown) => {
            let mut store = store.lock().unwrap();
            answer(
                &mut store,
                &parts.method,
                parts.uri.path(),
                parts.uri.query().unwrap_or(""),
                &parts.headers,
                body,
            )
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::SlowDown) => status(StatusCode::SERVICE_UNAVAILABLE, "SlowDown"),
        Some(Fault::Busy) => status(StatusCode::CONFLICT, "ConditionalRequestConflict"),
        Some(Fault::Forbidden) => status(
            StatusCode::FORBIDDEN,
            &format!("InvalidAccessKeyId {ACCESS_KEY} {SECRET_KEY} {:?}", parts.headers),
        ),
    };
    match fault {
        Some(Fault::DoneAndHang) => std::future::pending().await,
        Some(Fault::DoneAndSlowDown) => status(StatusCode::SERVICE_UNAVAILABLE, "SlowDown"),
        _ => answer,
    }
}

fn answer(
    store: &mut Store,
    method: &Method,
    path: &str,
    query: &str,
    headers: &HeaderMap,
    body: Bytes,
) -> Response {
    let Some(key) = path.strip_prefix("/journals") else {
        return status(StatusCode::NOT_FOUND, "NoSuchBucket");
    };
    let key = key.trim_start_matches('/').to_owned();
    let says = |key: &str| headers.get("authorization").is_some_and(|a| a.to_str().unwrap().contains(key));
    if !says(store.rotated.unwrap_or(ACCESS_KEY)) {
        return status(StatusCode::FORBIDDEN, "InvalidAccessKeyId");
    }
    if *method == Method::PUT {
        store.puts.push(headers.clone());
        if headers.get("if-none-match").is_some_and(|v| v == "*") && store.objects.contains_key(&key) {
            return status(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
        }
        store.objects.insert(key, body);
        return ([(header::ETAG, "\"1\"")], "").into_response();
    }
    assert_eq!(*method, Method::GET);
    if key.is_empty() {
        return listing(store, query);
    }
    match store.objects.get(&key) {
        Some(bytes) => ([(header::ETAG, "\"1\"")], bytes.clone()).into_response(),
        None => status(StatusCode::NOT_FOUND, "NoSuchKey"),
    }
}

/// ListObjectsV2, page by page.
fn listing(store: &Store, query: &str) -> Response {
    let value = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value.replace("%2F", "/"))
    };
    let prefix = value("prefix").unwrap_or_default();
    let after = value("continuation-token").unwrap_or_default();
    let mut keys = store.objects.keys().filter(|key| key.starts_with(&prefix) && **key > after);
    let page: Vec<&String> = keys.by_ref().take(PAGE).collect();
    let next = keys.next().and(page.last());
    let contents: String = page
        .iter()
        .map(|key| {
            format!(
                "<Contents><Key>{key}</Key><LastModified>2026-11-21T00:00:00.000Z</LastModified>\
                 <ETag>1</ETag><Size>1</Size></Contents>"
            )
        })
        .collect();
    let token = next.map(|key| format!("<NextContinuationToken>{key}</NextContinuationToken>"));
    format!(
        "<ListBucketResult><IsTruncated>{}</IsTruncated>{contents}{}</ListBucketResult>",
        next.is_some(),
        token.unwrap_or_default()
    )
    .into_response()
}

/// A directory that is removed at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(files: &[(&str, &str)]) -> Scratch {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("valkeeper-archive-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for (name, value) in files {
            fs::write(folder.join(name), value).unwrap();
        }
        Scratch(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Somebody's authority: with it the tests need none of this machine's.
fn authority() -> String {
    Certified::root(Timestamp(1_795_251_600_000_000_000)).unwrap().chain
}

struct Bench {
    store: Shared,
    blobs: Arc<dyn Blobs>,
    folder: Scratch,
}

impl Bench {
    async fn new(url: &str) -> Bench {
        let store = Shared::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().fallback(serve).with_state(store.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        let authority = authority();
        let folder = Scratch::new(&[]);
        let secret = format!("{SECRET_KEY}\r\n");
        let files = [
            ("aws_endpoint", endpoint.as_str()),
            ("aws_allow_http", "true\n"),
            ("aws_access_key_id", ACCESS_KEY),
            ("aws_secret_access_key", &secret),
            ("aws_region", "eu-central-1"),
            ("ca.crt", &authority),
        ];
        let volume = folder.0.join("..2026_11_21");
        fs::create_dir(&volume).unwrap();
        symlink("..2026_11_21", folder.0.join("..data")).unwrap();
        for (name, value) in files {
            fs::write(volume.join(name), value).unwrap();
            symlink(Path::new("..data").join(name), folder.0.join(name)).unwrap();
        }
        let blobs = open_within(url, Some(&folder.0), HASTY).unwrap();
        Bench { store, blobs, folder }
    }

    /// Changes some of the credentials, as Kubernetes changes a mounted Secret: all of them at once, by a link.
    fn remount(&self, volume: &str, changed: &[(&str, &str)]) {
        let (root, next) = (&self.folder.0, self.folder.0.join(volume));
        fs::create_dir(&next).unwrap();
        for entry in fs::read_dir(root.join("..data")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), next.join(entry.file_name())).unwrap();
        }
        for (name, value) in changed {
            fs::write(next.join(name), value).unwrap();
        }
        symlink(volume, root.join("..data_tmp")).unwrap();
        fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
    }

    fn inject(&self, faults: &[Fault]) {
        self.store.lock().unwrap().faults.extend(faults);
    }

    fn keys(&self) -> Vec<String> {
        self.store.lock().unwrap().objects.keys().cloned().collect()
    }
}

fn stream() -> StreamId {
    StreamId("uid-1".to_owned())
}

fn chain(records: u64) -> Vec<Stored> {
    let mut chain: Vec<Stored> = Vec::new();
    for seq in 1..=records {
        let event = match seq {
            1 => Event::Baseline {
                cluster_uid: stream().0,
                namespace: "shop".to_owned(),
                name: "orders".to_owned(),
                origin: BaselineOrigin::Empty,
            },
            n => Event::PodChanged { member: MemberId::new(0, n as u16), pod: Observed::Absent },
        };
        let record = Record { seq: Seq(seq), epoch: WriterEpoch(1), time: Timestamp(seq as i64), event };
        chain.push(Stored::seal(record, chain.last().map_or(Hash::ZERO, |before| before.hash)).unwrap());
    }
    chain
}

fn branch() -> Branch {
    Branch::first(stream())
}

async fn read_back(archive: &Archive) -> Vec<Stored> {
    let mut pages = archive.read(&branch()).await.unwrap();
    let mut all = Vec::new();
    while let Some(page) = pages.next().await.unwrap() {
        all.extend(page);
    }
    all
}

#[tokio::test]
async fn a_journal_is_archived_in_a_bucket_below_its_prefix_and_read_back() {
    for (url, prefix) in
        [("s3://journals/prod/eu", "prod/eu/"), ("s3://journals", ""), ("s3://journals/a/", "a/")]
    {
        let bench = Bench::new(url).await;
        bench.store.lock().unwrap().objects.insert("prod/other.txt".to_owned(), Bytes::new());
        let archive = Archive::with_limit(bench.blobs.clone(), 2_000);
        let chain = chain(60);
        assert_eq!(archive.store(&branch(), &chain[..50]).await.unwrap().last, Seq(50));
        assert_eq!(archive.store(&branch(), &chain).await.unwrap().last, Seq(60));
        assert_eq!(read_back(&archive).await, chain);
        assert_eq!(archive.branches().await.unwrap(), [branch()]);
        let ours = bench.keys().into_iter().filter(|key| key.starts_with(&format!("{prefix}uid-1/0000")));
        assert!(ours.count() > 2 * PAGE, "{:?}", bench.keys());
        for headers in &bench.store.lock().unwrap().puts {
            assert_eq!(headers.get("if-none-match").unwrap(), "*");
        }
    }
}

#[tokio::test]
async fn a_name_is_written_once() {
    let bench = Bench::new("s3://journals").await;
    bench.blobs.put_new("a/b", b"first").await.unwrap();
    assert_eq!(bench.blobs.put_new("a/b", b"second").await, Err(BlobsError::AlreadyExists));
    bench.inject(&[Fault::Busy]);
    assert_eq!(bench.blobs.put_new("a/c", b"third").await, Err(BlobsError::AlreadyExists));
    assert_eq!(bench.blobs.get("a/b", 5).await.unwrap().unwrap(), b"first");
    assert_eq!(bench.blobs.get("a/b", 4).await, Err(BlobsError::TooLarge { max: 4 }));
    assert_eq!(bench.blobs.get("a/c", 5).await.unwrap(), None);
    assert_eq!(bench.blobs.list("a/").await.unwrap(), ["a/b"]);
    assert_eq!(bench.blobs.list("").await.unwrap(), ["a/b"]);
}

#[tokio::test]
async fn a_blink_of_the_store_is_not_seen_and_a_longer_one_is_said() {
    let bench = Bench::new("s3://journals").await;
    bench.inject(&[Fault::SlowDown; RETRIES_MAX]);
    bench.blobs.put_new("a", b"first").await.unwrap();
    bench.inject(&[Fault::SlowDown; RETRIES_MAX]);
    assert_eq!(bench.blobs.get("a", 5).await.unwrap().unwrap(), b"first");
    bench.inject(&[Fault::SlowDown; RETRIES_MAX]);
    assert_eq!(bench.blobs.list("").await.unwrap(), ["a"]);
    // Whether a write that was answered with a 503 was made, nobody knows.
    bench.inject(&[Fault::SlowDown; RETRIES_MAX + 1]);
    let doubt = bench.blobs.put_new("b", b"x").await.unwrap_err();
    assert!(matches!(&doubt, BlobsError::Ambiguous(why) if why.contains("503")), "{doubt}");
    bench.inject(&[Fault::SlowDown; RETRIES_MAX + 1]);
    let refused = bench.blobs.get("a", 5).await.unwrap_err();
    assert!(matches!(&refused, BlobsError::Unavailable(why) if why.contains("503")), "{refused}");
    bench.inject(&[Fault::SlowDown; RETRIES_MAX + 1]);
    assert!(matches!(bench.blobs.list("").await, Err(BlobsError::Unavailable(_))));
    assert!(bench.store.lock().unwrap().faults.is_empty());
    assert_eq!(bench.keys(), ["a"]);
}

#[tokio::test]
async fn a_store_that_hangs_is_not_waited_for() {
    let bench = Bench::new("s3://journals").await;
    for (fault, written) in [(Fault::Hang, 0), (Fault::DoneAndHang, 1)] {
        bench.inject(&[fault]);
        let began = Instant::now();
        let doubt = bench.blobs.put_new("a", b"first").await.unwrap_err();
        assert!(matches!(doubt, BlobsError::Ambiguous(_)), "{doubt}");
        assert!(began.elapsed() < HASTY.call, "{:?}", began.elapsed());
        assert_eq!(bench.keys().len(), written);
    }
    // A read is tried again, but not for ever.
    bench.inject(&[Fault::Hang]);
    assert_eq!(bench.blobs.get("a", 5).await.unwrap().unwrap(), b"first");
    bench.inject(&[Fault::Hang; 20]);
    let began = Instant::now();
    assert!(matches!(bench.blobs.get("a", 5).await, Err(BlobsError::Unavailable(_))));
    assert!(matches!(bench.blobs.list("").await, Err(BlobsError::Unavailable(_))));
    assert!(began.elapsed() < 2 * HASTY.call + HASTY.request, "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_archive_is_completed_whatever_a_write_met() {
    let chain = chain(60);
    for fault in [Fault::SlowDown, Fault::DoneAndSlowDown, Fault::Hang, Fault::DoneAndHang, Fault::Busy] {
        let bench = Bench::new("s3://journals").await;
        let archive = Archive::with_limit(bench.blobs.clone(), 6_000);
        archive.store(&branch(), &chain[..30]).await.unwrap();
        bench.store.lock().unwrap().faults.clear();
        // Only the write meets it: a listing and a read of what is there come before.
        let before = archive.covered(&branch()).await.unwrap().unwrap();
        assert_eq!(before.last, Seq(30));
        let (segment, bytes) = ("uid-1/probe", vec![7; 100]);
        bench.inject(&[fault]);
        let probed = bench.blobs.put_new(segment, &bytes).await;
        let is_known = matches!(probed, Ok(()) | Err(BlobsError::AlreadyExists));
        assert_eq!(is_known, !matches!(fault, Fault::Hang | Fault::DoneAndHang), "{probed:?}");
        for _ in 0..3 {
            bench.inject(&[fault]);
            match archive.store(&branch(), &chain).await {
                Ok(archived) => assert_eq!(archived.last, Seq(60)),
                Err(e) => assert!(matches!(e, ArchiveError::Unavailable(_)), "{e}"),
            }
        }
        bench.store.lock().unwrap().faults.clear();
        assert_eq!(archive.store(&branch(), &chain).await.unwrap().last, Seq(60));
        assert_eq!(read_back(&archive).await, chain);
    }
}

#[tokio::test]
async fn what_the_store_says_is_told_without_secrets_and_not_at_length() {
    let bench = Bench::new("s3://journals").await;
    bench.inject(&[Fault::Forbidden; 3]);
    let errors = [
        bench.blobs.put_new("a", b"x").await.unwrap_err(),
        bench.blobs.get("a", 1).await.unwrap_err(),
        bench.blobs.list("").await.unwrap_err(),
    ];
    for e in errors {
        let BlobsError::Unavailable(why) = &e else { panic!("{e:?}") };
        assert!(why.contains("403") || why.contains("privileges"), "{why}");
        assert!(!why.contains(ACCESS_KEY) && !why.contains(SECRET_KEY), "{why}");
        assert!(why.chars().count() <= WHY_CHARS_MAX, "{why}");
    }
    let missing = Bench::new("s3://another").await;
    assert!(matches!(missing.blobs.put_new("a", b"x").await, Err(BlobsError::Unavailable(_))));
    assert!(matches!(missing.blobs.list("").await, Err(BlobsError::Unavailable(_))));
}

#[tokio::test]
async fn keys_that_were_rotated_are_used_without_opening_the_archive_again() {
    let bench = Bench::new("s3://journals").await;
    let (archive, chain) = (Archive::new(bench.blobs.clone()), chain(40));
    archive.store(&branch(), &chain[..20]).await.unwrap();
    let rotated = "AKIAROTATEDROTATED00";
    bench.store.lock().unwrap().rotated = Some(rotated);
    let refused = archive.store(&branch(), &chain).await.unwrap_err();
    assert!(matches!(refused, ArchiveError::Unavailable(_)), "{refused}");
    bench.remount(
        "..2026_11_22",
        &[("aws_access_key_id", rotated), ("aws_secret_access_key", "another/secret")],
    );
    assert_eq!(archive.store(&branch(), &chain).await.unwrap().last, Seq(40));
    assert_eq!(read_back(&archive).await, chain);
    // What is hidden in errors is what is in use now.
    bench.store.lock().unwrap().rotated = None;
    let refused = archive.store(&branch(), &chain).await.unwrap_err().to_string();
    assert!(refused.contains("403") && !refused.contains(rotated), "{refused}");
}

#[tokio::test]
async fn credentials_that_cannot_be_used_change_nothing_and_are_said_once() {
    let bench = Bench::new("s3://journals").await;
    let files = Files::read(Some(&bench.folder.0)).unwrap();
    let prefix = BlobPath::parse("").unwrap();
    let place = Place { scheme: "s3".to_owned(), bucket: "journals".to_owned(), prefix, limits: HASTY };
    let opened = Arc::new(place.open(&files).unwrap());
    let renewing = Renewing::new(place, &bench.folder.0, files, opened);
    assert_eq!(renewing.renew().await, None);
    bench.remount("..half", &[("ca.crt", "-----BEGIN CERTIFI"), ("aws_access_key_id", "AKIAHALF")]);
    let said = renewing.renew().await.unwrap();
    assert!(said.contains("ca.crt holds no certificates"), "{said}");
    for _ in 0..3 {
        assert_eq!(renewing.renew().await, None, "it was said");
        renewing.put_new("a", b"x").await.ok();
        assert_eq!(renewing.get("a", 1).await.unwrap().unwrap(), b"x", "with the former ones");
    }
    bench.remount("..gone", &[("ca.crt", &authority())]);
    fs::remove_dir_all(bench.folder.0.join("..gone")).unwrap();
    assert!(renewing.renew().await.unwrap().contains("/aws_access_key_id"));
    assert_eq!(renewing.list("").await.unwrap(), ["a"]);
}

#[tokio::test]
async fn a_directory_is_an_archive_and_must_be_there() {
    let folder = Scratch::new(&[]);
    let open_at = |path: &Path| open(&format!("file://{}", path.display()), None).unwrap();
    let archive = Archive::new(open_at(&folder.0));
    let chain = chain(40);
    assert_eq!(archive.store(&branch(), &chain).await.unwrap().last, Seq(40));
    // By somebody else, later.
    assert_eq!(read_back(&Archive::new(open_at(&folder.0))).await, chain);
    let missing = Archive::new(open_at(&folder.0.join("not-mounted")));
    let refused = missing.store(&branch(), &chain).await.unwrap_err();
    assert!(matches!(&refused, ArchiveError::Unavailable(why) if why.contains("not-mounted")), "{refused}");
}

#[track_caller]
fn refused(url: &str, files: &[(&str, &str)]) -> String {
    let authority = authority();
    let folder = Scratch::new(&[files, &[("ca.crt", &authority)]].concat());
    let text = match open(url, Some(&folder.0)) {
        Ok(_) => panic!("{url} was opened"),
        Err(e) => e.to_string(),
    };
    for (_, value) in files.iter().filter(|(_, value)| value.len() >= SECRET_CHARS_MIN) {
        assert!(!text.contains(value), "{text}");
    }
    text
}

#[test]
fn a_wrong_url_is_refused_and_not_repeated() {
    let cases = [
        ("", "has no scheme"),
        ("journals/prod", "has no scheme"),
        ("ftp://journals", "unknown scheme"),
        ("https://s3.amazonaws.com/journals", "unknown scheme"),
        ("s3://", "names no bucket"),
        ("gs:///prefix", "names no bucket"),
        ("s3://key:secret@journals", "something else than a bucket's name"),
        ("s3://journals?token=x", "something else than a bucket's name"),
        ("s3://journals:9000/a", "something else than a bucket's name"),
        ("s3://journals/a//b", "a prefix that is no path"),
        ("s3://journals/../b", "a prefix that is no path"),
        ("file://relative", "whole path"),
        ("file:///somewhere", "no credentials"),
    ];
    for (url, why) in cases {
        let text = refused(url, &[]);
        assert!(text.starts_with("the archive's URL ") && text.contains(why), "{url}: {text}");
        assert!(url.is_empty() || !text.contains(url), "{text}");
    }
}

#[test]
fn a_wrong_setting_is_named_by_its_file_and_its_value_is_never_shown() {
    let secret = "hunter2hunter2";
    for url in ["s3://journals", "gs://journals", "az://journals"] {
        let text = refused(url, &[("aws_secret_acess_key", secret)]);
        assert!(text.contains("/aws_secret_acess_key is no setting of this kind of store"), "{text}");
    }
    assert!(refused("gs://j", &[("aws_access_key_id", secret)]).contains("/aws_access_key_id is no setting"));
    assert!(refused("s3://j", &[("aws_allow_http", secret)]).contains("settings are refused"));
    assert!(refused("s3://j", &[("aws_access_key_id", secret)]).contains("settings are refused"));
    assert!(refused("az://j", &[("azure_storage_account_key", secret)]).contains("settings are refused"));
    let json = format!(
        r#"{{"type": "service_account", "private_key": {{"{secret}": "x"}}, "disable_oauth": "{secret}"}}"#
    );
    let text = refused("gs://j", &[("google_service_account_key", &json)]);
    assert!(text.contains("settings are refused") && !text.contains(secret), "{text}");
    let large = "x".repeat(SETTING_BYTES_MAX as usize + 1);
    assert!(refused("s3://j", &[("aws_token", &large)]).contains("/aws_token is too large"));
    let folder = Scratch::new(&[("ca.crt", "not a certificate")]);
    let text = open("s3://j", Some(&folder.0)).err().unwrap().to_string();
    assert!(text.contains("ca.crt holds no certificates"), "{text}");
    fs::write(folder.0.join("ca.crt"), authority()).unwrap();
    fs::write(folder.0.join("aws_token"), b"\xff\xfe").unwrap();
    assert!(open("s3://j", Some(&folder.0)).err().unwrap().to_string().contains("/aws_token is no text"));
    let missing = open("s3://j", Some(&folder.0.join("missing"))).err().unwrap();
    assert!(missing.to_string().contains("/missing"), "{missing}");
}

#[test]
fn every_kind_of_bucket_opens_with_its_own_settings() {
    let key = "c2VjcmV0c2VjcmV0";
    let authority = authority();
    let cases: [(&str, &[(&str, &str)]); 3] = [
        ("s3://journals/a", &[("aws_access_key_id", ACCESS_KEY), ("aws_secret_access_key", SECRET_KEY)]),
        ("gs://journals/a", &[("google_bearer_token", "token")]),
        ("az://journals/a", &[("azure_storage_account_name", "shop"), ("azure_storage_account_key", key)]),
    ];
    for (url, files) in cases {
        let folder = Scratch::new(&[files, &[("ca.crt", &authority)]].concat());
        assert!(open(url, Some(&folder.0)).is_ok(), "{url}");
    }
}
