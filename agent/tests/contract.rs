//! The contract only grows: every field, enum value and call that was ever given out (`agent.txt` beside the contract) is
//! still there, under its name, number and type. `UPDATE_GOLDEN=1` adds what is new to the list; it never takes away.

#![allow(clippy::unwrap_used, clippy::panic, reason = "the helpers of a test are a test")]

use prost::Message;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
    field_descriptor_proto::{Label, Type},
};
use std::{collections::BTreeSet, fs, path::Path};
use valkeeper_agent::proto::{Brief, PromoteRequest};

const PACKAGE: &str = "valkeeper.agent.v1";

fn field(message: &str, field: &FieldDescriptorProto) -> String {
    let kind = match field.r#type() {
        Type::Message | Type::Enum => bare(field.type_name()),
        scalar @ (Type::Double
        | Type::Float
        | Type::Int64
        | Type::Uint64
        | Type::Int32
        | Type::Fixed64
        | Type::Fixed32
        | Type::Bool
        | Type::String
        | Type::Group
        | Type::Bytes
        | Type::Uint32
        | Type::Sfixed32
        | Type::Sfixed64
        | Type::Sint32
        | Type::Sint64) => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    let many = if field.label() == Label::Repeated { "repeated " } else { "" };
    let presence = if field.proto3_optional() { "optional " } else { "" };
    format!("{message}.{} = {} {many}{presence}{kind}", field.name(), field.number())
}

/// A type's name without the package.
fn bare(name: &str) -> String {
    name.trim_start_matches('.').trim_start_matches(PACKAGE).trim_start_matches('.').to_owned()
}

fn message(outer: &str, described: &DescriptorProto) -> Vec<String> {
    let name = format!("{outer}{}", described.name());
    let mut lines: Vec<String> = described.field.iter().map(|each| field(&name, each)).collect();
    let inner = format!("{name}.");
    lines.extend(described.enum_type.iter().flat_map(|each| values(&inner, each)));
    lines.extend(described.nested_type.iter().flat_map(|each| message(&inner, each)));
    lines
}

fn values(outer: &str, described: &EnumDescriptorProto) -> Vec<String> {
    let line = |name: &str, number| format!("{outer}{}.{name} = {number}", described.name());
    described.value.iter().map(|value| line(value.name(), value.number())).collect()
}

fn calls(service: &ServiceDescriptorProto) -> Vec<String> {
    let streamed = |is: bool| if is { "stream " } else { "" };
    let line = |call: &prost_types::MethodDescriptorProto| {
        let (from, to) = (streamed(call.client_streaming()), streamed(call.server_streaming()));
        let (request, response) = (bare(call.input_type()), bare(call.output_type()));
        format!("{}.{} {from}{request} -> {to}{response}", service.name(), call.name())
    };
    service.method.iter().map(line).collect()
}

/// What the contract has now, in its order.
fn present() -> Vec<String> {
    let bytes: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/contract.bin"));
    let all = FileDescriptorSet::decode(bytes).unwrap();
    let [file] = &all.file[..] else { panic!("one file is the contract") };
    assert_eq!(file.package(), PACKAGE);
    let services = file.service.iter().flat_map(calls);
    let messages = file.message_type.iter().flat_map(|each| message("", each));
    services.chain(messages).chain(file.enum_type.iter().flat_map(|each| values("", each))).collect()
}

#[test]
fn whatever_was_given_out_stays_as_it_is_and_what_is_new_is_listed() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/valkeeper/agent/v1/agent.txt");
    let list = fs::read_to_string(&path).unwrap_or_default();
    let (now, listed) = (present(), list.lines().map(str::to_owned).collect::<BTreeSet<_>>());
    let known: BTreeSet<String> = now.iter().cloned().collect();
    let gone: Vec<&String> = listed.difference(&known).collect();
    assert!(
        gone.is_empty(),
        "older agents and operators rely on these; put them back, or make a v2 beside v1: {gone:#?}"
    );
    let new: Vec<&String> = known.difference(&listed).collect();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, now.join("\n") + "\n").unwrap();
    } else {
        assert!(
            new.is_empty(),
            "new in the contract, for ever: read it once more, then UPDATE_GOLDEN=1 lists it: {new:#?}"
        );
    }
}

#[test]
fn a_request_with_a_later_field_means_what_it_meant_without() {
    let brief = Brief { grant: 7, holder: "0-1".into(), roster: vec!["0-1".into()], isolation_ms: 2_000 };
    let known = PromoteRequest { epoch: 3, brief: Some(brief), offset: 12, ..PromoteRequest::default() };
    let mut bytes = known.encode_to_vec();
    prost::encoding::string::encode(900, &"later".to_owned(), &mut bytes);
    prost::encoding::uint64::encode(901, &1, &mut bytes);
    assert_eq!(PromoteRequest::decode(&bytes[..]).unwrap(), known);
}
