// Command golden writes golden vectors made by go-libp2p, so that the Python
// side's own envelope code is held against another implementation.
//
// It reads one JSON document from standard input:
//
//	{"records": [{"domain": "...", "payload_type": "<hex>", "payload": "<hex>"}],
//	 "service_keys": ["/lloom/executor/1.0.0"]}
//
// and writes one to standard output: the fixed key (Ed25519 from the seed bytes
// 00 01 .. 1f; it protects nothing), each record with its signed envelope
// (record.Seal), and each service key with its CID (CIDv1, raw, sha2-256).
package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/ipfs/go-cid"
	"github.com/multiformats/go-multihash"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/record"
)

// maxInputBytes bounds standard input.
const maxInputBytes = 16 << 20

type input struct {
	Records     []recordInput `json:"records"`
	ServiceKeys []string      `json:"service_keys"`
}

type recordInput struct {
	Domain      string `json:"domain"`
	PayloadType string `json:"payload_type"`
	Payload     string `json:"payload"`
}

type output struct {
	Key         keyOutput          `json:"key"`
	Records     []recordOutput     `json:"records"`
	ServiceKeys []serviceKeyOutput `json:"service_keys"`
}

type keyOutput struct {
	Seed       string `json:"seed"`
	PrivateKey string `json:"private_key"`
	PublicKey  string `json:"public_key"`
	PeerID     string `json:"peer_id"`
}

type recordOutput struct {
	recordInput
	Envelope string `json:"envelope"`
}

type serviceKeyOutput struct {
	Key      string `json:"key"`
	CID      string `json:"cid"`
	CIDBytes string `json:"cid_bytes"`
}

// opaque is a record whose domain, codec and payload are given.
type opaque struct {
	domain         string
	codec, payload []byte
}

// Domain implements record.Record.
func (o *opaque) Domain() string { return o.domain }

// Codec implements record.Record.
func (o *opaque) Codec() []byte { return o.codec }

// MarshalRecord implements record.Record.
func (o *opaque) MarshalRecord() ([]byte, error) { return o.payload, nil }

// UnmarshalRecord implements record.Record.
func (o *opaque) UnmarshalRecord(b []byte) error {
	o.payload = bytes.Clone(b)
	return nil
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "golden:", err)
		os.Exit(1)
	}
}

func run(r io.Reader, w io.Writer) error {
	d := json.NewDecoder(io.LimitReader(r, maxInputBytes))
	d.DisallowUnknownFields()
	var in input
	if err := d.Decode(&in); err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	seed := make([]byte, 32)
	for i := range seed {
		seed[i] = byte(i)
	}
	key, public, err := crypto.GenerateEd25519Key(bytes.NewReader(seed))
	if err != nil {
		return err
	}
	out := output{Records: []recordOutput{}, ServiceKeys: []serviceKeyOutput{}}
	if out.Key, err = describeKey(seed, key, public); err != nil {
		return err
	}
	for i, rec := range in.Records {
		envelope, err := seal(rec, key)
		if err != nil {
			return fmt.Errorf("record %d: %w", i, err)
		}
		out.Records = append(out.Records, recordOutput{rec, hex.EncodeToString(envelope)})
	}
	for _, k := range in.ServiceKeys {
		hash, err := multihash.Sum([]byte(k), multihash.SHA2_256, -1)
		if err != nil {
			return fmt.Errorf("service key %q: %w", k, err)
		}
		c := cid.NewCidV1(cid.Raw, hash)
		out.ServiceKeys = append(out.ServiceKeys, serviceKeyOutput{k, c.String(), hex.EncodeToString(c.Bytes())})
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(out)
}

func describeKey(seed []byte, key crypto.PrivKey, public crypto.PubKey) (keyOutput, error) {
	raw, err := key.Raw()
	if err != nil {
		return keyOutput{}, err
	}
	if !bytes.Equal(raw[:len(seed)], seed) {
		return keyOutput{}, errors.New("the key was not made from the seed")
	}
	private, err := crypto.MarshalPrivateKey(key)
	if err != nil {
		return keyOutput{}, err
	}
	pub, err := crypto.MarshalPublicKey(public)
	if err != nil {
		return keyOutput{}, err
	}
	id, err := peer.IDFromPublicKey(public)
	if err != nil {
		return keyOutput{}, err
	}
	return keyOutput{hex.EncodeToString(seed), hex.EncodeToString(private), hex.EncodeToString(pub), id.String()}, nil
}

// seal signs one record and reads the envelope back, so that nothing which
// go-libp2p itself would refuse becomes golden.
func seal(in recordInput, key crypto.PrivKey) ([]byte, error) {
	codec, err := hex.DecodeString(in.PayloadType)
	if err != nil {
		return nil, fmt.Errorf("payload_type: %w", err)
	}
	payload, err := hex.DecodeString(in.Payload)
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	envelope, err := record.Seal(&opaque{in.Domain, codec, payload}, key)
	if err != nil {
		return nil, err
	}
	b, err := envelope.Marshal()
	if err != nil {
		return nil, err
	}
	read := &opaque{domain: in.Domain, codec: codec}
	if _, err := record.ConsumeTypedEnvelope(b, read); err != nil {
		return nil, fmt.Errorf("go-libp2p refuses its own envelope: %w", err)
	}
	if !bytes.Equal(read.payload, payload) {
		return nil, errors.New("the payload came back changed")
	}
	return b, nil
}
