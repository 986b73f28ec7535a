// Writing OCI image archives without a registry or a build tool: layers in, one tar out.
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"
)

// layerFile is one entry of a layer made here; a name that ends in a slash is a folder.
type layerFile struct {
	name string
	mode int64
	data []byte
}

// tarLayer packs files. All times are zero, so that the same input gives the same digest.
func tarLayer(files []layerFile) ([]byte, error) {
	var out bytes.Buffer
	writer := tar.NewWriter(&out)
	for _, f := range files {
		header := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.data)), ModTime: time.Unix(0, 0)}
		if strings.HasSuffix(f.name, "/") {
			header.Typeflag = tar.TypeDir
		}
		if err := writer.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := writer.Write(f.data); err != nil {
			return nil, err
		}
	}
	err := writer.Close()
	return out.Bytes(), err
}

// imageConfig is the part of an image that says how it runs, in the words of the OCI format.
type imageConfig struct {
	User         string              `json:"User,omitempty"`
	Env          []string            `json:"Env,omitempty"`
	Entrypoint   []string            `json:"Entrypoint,omitempty"`
	Cmd          []string            `json:"Cmd,omitempty"`
	WorkingDir   string              `json:"WorkingDir,omitempty"`
	Volumes      map[string]struct{} `json:"Volumes,omitempty"`
	ExposedPorts map[string]struct{} `json:"ExposedPorts,omitempty"`
}

// image is an archive to be written: uncompressed layers, lowest first, under one or more names.
type image struct {
	names   []string
	archive string
	layers  [][]byte
	config  imageConfig
}

// descriptor points to a blob of the archive.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

const (
	layerType    = "application/vnd.oci.image.layer.v1.tar"
	configType   = "application/vnd.oci.image.config.v1+json"
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	indexType    = "application/vnd.oci.image.index.v1+json"
)

// write makes the archive under a temporary name first: a half-written one is never found.
func (i *image) write() error {
	file, err := os.Create(i.archive + ".new")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if err := i.writeTo(file); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	return os.Rename(file.Name(), i.archive)
}

func (i *image) writeTo(out io.Writer) error {
	archive := &blobWriter{tar: tar.NewWriter(out), seen: map[string]bool{}}
	manifest := map[string]any{"schemaVersion": 2, "mediaType": manifestType}
	var layers []descriptor
	var digests []string
	for _, layer := range i.layers {
		d := archive.blob(layerType, layer)
		layers, digests = append(layers, d), append(digests, d.Digest)
	}
	manifest["layers"] = layers
	manifest["config"] = archive.json(configType, map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       i.config,
		"rootfs":       map[string]any{"type": "layers", "diff_ids": digests},
	})
	described := archive.json(manifestType, manifest)
	var entries []descriptor
	for _, name := range i.names {
		entry := described
		entry.Annotations = map[string]string{
			"io.containerd.image.name":          name,
			"org.opencontainers.image.ref.name": name[strings.LastIndexByte(name, ':')+1:],
		}
		entries = append(entries, entry)
	}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": indexType, "manifests": entries})
	if err != nil {
		return err
	}
	archive.file("index.json", index)
	archive.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return errors.Join(archive.err, archive.tar.Close())
}

// blobWriter adds files to an archive and keeps the first error.
type blobWriter struct {
	tar  *tar.Writer
	seen map[string]bool
	err  error
}

func (w *blobWriter) blob(mediaType string, data []byte) descriptor {
	digest := fmt.Sprintf("%x", sha256.Sum256(data))
	if !w.seen[digest] {
		w.seen[digest] = true
		w.file("blobs/sha256/"+digest, data)
	}
	return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: int64(len(data))}
}

func (w *blobWriter) json(mediaType string, value any) descriptor {
	data, err := json.Marshal(value)
	w.err = errors.Join(w.err, err)
	return w.blob(mediaType, data)
}

func (w *blobWriter) file(name string, data []byte) {
	header := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(0, 0)}
	w.err = errors.Join(w.err, w.tar.WriteHeader(header))
	_, err := w.tar.Write(data)
	w.err = errors.Join(w.err, err)
}

// listFlag is a flag that may be given several times.
type listFlag []string

func (l *listFlag) String() string         { return strings.Join(*l, " ") }
func (l *listFlag) Set(value string) error { *l = append(*l, value); return nil }

// verbWriteImage is how the image script writes its archives.
func verbWriteImage(_ *cluster, args []string) error {
	var names, layers, entrypoint, cmd, env, volumes, ports listFlag
	var out image
	flags := flag.NewFlagSet("write-image", flag.ContinueOnError)
	flags.StringVar(&out.archive, "out", "", "archive to write")
	flags.StringVar(&out.config.User, "user", "", "user to run as")
	flags.StringVar(&out.config.WorkingDir, "workdir", "/", "folder to start in")
	flags.Var(&names, "name", "full image name")
	flags.Var(&layers, "layer", "layer as an uncompressed tar, lowest first")
	flags.Var(&entrypoint, "entrypoint", "word of the entry point")
	flags.Var(&cmd, "cmd", "word of the default arguments")
	flags.Var(&env, "env", "NAME=value")
	flags.Var(&volumes, "volume", "folder that is a volume")
	flags.Var(&ports, "port", "port such as 6379/tcp")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if out.archive == "" || len(names) == 0 || len(layers) == 0 {
		return errors.New("write-image needs -out, -name and -layer")
	}
	out.names = names
	out.config.Entrypoint, out.config.Cmd, out.config.Env = entrypoint, cmd, env
	out.config.Volumes, out.config.ExposedPorts = set(volumes), set(ports)
	for _, file := range layers {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		out.layers = append(out.layers, data)
	}
	return out.write()
}

func set(values []string) map[string]struct{} {
	found := map[string]struct{}{}
	for _, value := range values {
		found[value] = struct{}{}
	}
	return found
}
