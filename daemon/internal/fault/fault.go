// Package fault holds the one form in which the daemon tells its operator that
// it cannot start: what failed, why, and what to do about it, on one line.
package fault

import "strings"

// Fault is an error that an operator can act on. Its text never holds a secret.
type Fault struct {
	// What names the thing that failed: a flag with its value, a file, an address.
	What string
	// Cause is the reason; errors.Is and errors.As see it.
	Cause error
	// Remedy is the next step, in the imperative.
	Remedy string
}

// New returns a Fault for what, caused by cause, with its remedy.
func New(what string, cause error, remedy string) *Fault {
	return &Fault{What: what, Cause: cause, Remedy: remedy}
}

// Error is "<what>: <cause>; <remedy>" on a single line, because supervisors
// keep the last line of standard error as the reason for a failed start.
func (f *Fault) Error() string {
	s := f.What + ": " + f.Cause.Error()
	if f.Remedy != "" {
		s += "; " + f.Remedy
	}
	return strings.Join(strings.Fields(s), " ")
}

// Unwrap gives errors.Is and errors.As the cause.
func (f *Fault) Unwrap() error { return f.Cause }
