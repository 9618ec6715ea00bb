package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	ma "github.com/multiformats/go-multiaddr"
)

// Maddr is a multiaddr as a flag and as a JSON string.
type Maddr struct{ ma.Multiaddr }

// Set parses s; it is flag.Value's.
func (m *Maddr) Set(s string) error {
	parsed, err := ma.NewMultiaddr(s)
	if err != nil {
		return err
	}
	m.Multiaddr = parsed
	return nil
}

// String is the multiaddr's text, empty when unset.
func (m *Maddr) String() string {
	if m == nil || m.Multiaddr == nil {
		return ""
	}
	return m.Multiaddr.String()
}

// UnmarshalJSON reads a JSON string. (Upstream's own type takes the quotes for
// a part of the address, so no document with an address ever loaded there.)
func (m *Maddr) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	return m.Set(s)
}

// Maddrs is a list of multiaddrs: comma separated in a flag or a JSON string,
// or a JSON array of strings.
type Maddrs []ma.Multiaddr

// Set parses a comma separated list and replaces what was there.
func (l *Maddrs) Set(s string) error {
	*l = nil
	if s == "" {
		return nil
	}
	for _, part := range strings.Split(s, ",") {
		parsed, err := ma.NewMultiaddr(strings.TrimSpace(part))
		if err != nil {
			return fmt.Errorf("%q: %w", part, err)
		}
		*l = append(*l, parsed)
	}
	return nil
}

// String is the comma separated list.
func (l *Maddrs) String() string {
	if l == nil {
		return ""
	}
	parts := make([]string, len(*l))
	for i, a := range *l {
		parts[i] = a.String()
	}
	return strings.Join(parts, ",")
}

// UnmarshalJSON reads a string or an array of strings.
func (l *Maddrs) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) == nil {
		return l.Set(s)
	}
	var many []string
	if err := json.Unmarshal(b, &many); err != nil {
		return err
	}
	return l.Set(strings.Join(many, ","))
}

// Duration is a time.Duration: "10s" in a flag, and in JSON either that or
// nanoseconds, which is what upstream's documents hold.
type Duration time.Duration

// Set parses Go's notation.
func (d *Duration) Set(s string) error {
	parsed, err := time.ParseDuration(s)
	if err != nil {
		// The package's text repeats the flag's value and its own name.
		return errors.New(`a duration such as "10s" or "500ms" is expected`)
	}
	if parsed < 0 {
		return errors.New("a duration cannot be negative")
	}
	*d = Duration(parsed)
	return nil
}

// String is Go's notation.
func (d *Duration) String() string {
	if d == nil {
		return "0s"
	}
	return time.Duration(*d).String()
}

// UnmarshalJSON reads a string in Go's notation or a number of nanoseconds.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) == nil {
		return d.Set(s)
	}
	var ns int64
	if err := json.Unmarshal(b, &ns); err != nil {
		return err
	}
	if ns < 0 {
		return errors.New("a duration cannot be negative")
	}
	*d = Duration(ns)
	return nil
}

// FileMode is a file permission in octal.
type FileMode fs.FileMode

// Set parses octal digits, with or without a leading 0 or 0o.
func (m *FileMode) Set(s string) error {
	parsed, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0o"), 8, 32)
	if err != nil || parsed > 0o777 {
		return errors.New("an octal mode such as 0600 or 0660 is expected")
	}
	if parsed&0o600 != 0o600 {
		return errors.New("the owner must be able to read and write (0600)")
	}
	*m = FileMode(parsed)
	return nil
}

// String is the mode in octal with a leading 0.
func (m *FileMode) String() string {
	if m == nil {
		return "0"
	}
	return fmt.Sprintf("%#o", uint32(*m))
}

// UnmarshalJSON reads a JSON string in octal.
func (m *FileMode) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	return m.Set(s)
}
