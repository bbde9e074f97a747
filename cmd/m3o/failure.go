package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// A failure is an error with what to do about it. Exit is 1, or 2 for misuse.
type failure struct {
	msg, hint string
	exit      int
	err       error // cause, not shown
}

func (f *failure) Error() string { return f.msg }
func (f *failure) Unwrap() error { return f.err }

// An exitStatus ends the program with the status of the command that it ran,
// which has said itself whatever there was to say.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func fail(msg, hint string) error   { return &failure{msg: msg, hint: hint, exit: 1} }
func misuse(msg, hint string) error { return &failure{msg: msg, hint: hint, exit: 2} }

// explain turns an error into what the user reads and the exit status.
func explain(ctx context.Context, err error) (msg, hint string, exit int) {
	f, ours := errors.AsType[*failure](err)
	switch {
	case ours:
		return tidy(f.msg), tidy(f.hint), f.exit
	case ctx.Err() != nil:
		return "interrupted", "", 1
	}
	ce, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return tidy(err.Error()), "", 1
	}
	for _, d := range ce.Details() {
		if v, err := d.Value(); err == nil {
			if h, ok := v.(*m3ov1.Hint); ok {
				hint = h.GetText()
			}
		}
	}
	exit = 1
	switch ce.Code() {
	case connect.CodeInvalidArgument:
		exit = 2
	case connect.CodeDeadlineExceeded:
		return "the server did not answer in time", "try again; m3o ps shows what it is at", 1
	}
	return tidy(ce.Message()), tidy(hint), exit
}

// tidy is a message as the CLI prints them: lower case, no full stop, nothing
// that moves a terminal's cursor.
func tidy(s string) string {
	s = strings.TrimSpace(plain(s))
	if strings.HasSuffix(s, ".") && !strings.HasSuffix(s, "..") {
		s = s[:len(s)-1]
	}
	first, n := utf8.DecodeRuneInString(s)
	if second, _ := utf8.DecodeRuneInString(s[n:]); unicode.IsUpper(first) && unicode.IsLower(second) {
		s = string(unicode.ToLower(first)) + s[n:]
	}
	return s
}

// reach explains why a server could not be spoken to, and passes on every
// other error. It is asked before anything is known to have reached the server.
func reach(err error, t target) error {
	if err == nil {
		return nil
	}
	fault := func(msg, hint string) error { return &failure{msg: msg, hint: hint, exit: 1, err: err} }
	login := "m3o login " + t.url.String()
	if ce, ok := errors.AsType[*connect.Error](err); ok && connect.IsWireError(ce) {
		switch ce.Code() {
		case connect.CodeUnauthenticated:
			return unauthenticated(ce, t, login)
		case connect.CodeUnimplemented:
			return fault(fmt.Sprintf("the server at %s does not know this call", t.url.Host), "is the server older than this m3o?")
		}
		return err
	}
	if unknownCA(err) {
		return fault(fmt.Sprintf("the certificate of %s is signed by a CA that this computer does not know", t.url.Hostname()),
			login+" shows the CA's fingerprint and asks")
	}
	if bad, ok := errors.AsType[x509.HostnameError](err); ok {
		return fault(fmt.Sprintf("the certificate of the server is not for %s", bad.Host), "check the URL; the API is at https://api.<domain>")
	}
	if bad, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		why := "is not valid"
		if bad.Reason == x509.Expired {
			why = "has expired or is not valid yet"
		}
		return fault(fmt.Sprintf("the certificate of %s %s", t.url.Hostname(), why), "check this computer's clock, then the server's")
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok || errors.Is(err, http.ErrSchemeMismatch) {
		return fault(fmt.Sprintf("%s does not speak TLS", t.url.Host), "check the port")
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return fault(fmt.Sprintf("no host called %s is known here", dns.Name), "check the URL and the network")
	}
	if refused(err) {
		return fault(fmt.Sprintf("nothing listens at %s", t.url.Host), "is m3od running? check the URL and the port")
	}
	switch code := connect.CodeOf(err); {
	case code == connect.CodeUnimplemented, code == connect.CodeUnknown && errors.Is(err, io.ErrUnexpectedEOF):
		return fault(fmt.Sprintf("%s does not answer as an m3o server", t.url.Host), "check the URL; the API is at https://api.<domain>")
	case code == connect.CodeUnauthenticated:
		return fault(fmt.Sprintf("%s refuses this login", t.url.Host), login)
	}
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return fault(fmt.Sprintf("%s did not answer in time", t.url.Host), "check the URL and the network")
	}
	if oe, ok := errors.AsType[*net.OpError](err); ok {
		return fault(fmt.Sprintf("cannot reach %s: %v", t.url.Host, oe.Err), "check the URL and the network")
	}
	return err
}

func unauthenticated(ce *connect.Error, t target, login string) error {
	_, hint, _ := explain(context.Background(), ce)
	if hint == "" {
		hint = login
	}
	switch {
	case t.token == "":
		return &failure{msg: fmt.Sprintf("not logged in to %s", t.url.Host), hint: hint, exit: 1, err: ce}
	case t.expired != "":
		return &failure{msg: fmt.Sprintf("the login to %s expired %s", t.url.Host, t.expired), hint: hint, exit: 1, err: ce}
	}
	return &failure{msg: fmt.Sprintf("%s refuses this login: %s", t.url.Host, ce.Message()), hint: hint, exit: 1, err: ce}
}

func unknownCA(err error) bool {
	_, ok := errors.AsType[x509.UnknownAuthorityError](err)
	return ok
}

// wsaRefused is what Windows says for ECONNREFUSED; no other system has so
// high a number.
const wsaRefused = syscall.Errno(10061)

func refused(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, wsaRefused)
}
