package daemon

import (
	"context"

	"connectrpc.com/connect"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

type doctorAPI struct{ d *Daemon }

// Check is in doctor.proto.
func (a doctorAPI) Check(ctx context.Context, _ *connect.Request[m3ov1.CheckRequest]) (*connect.Response[m3ov1.CheckResponse], error) {
	res := &m3ov1.CheckResponse{}
	for _, f := range a.d.doctor(ctx) {
		res.Findings = append(res.Findings, &m3ov1.Finding{Check: f.Check, State: f.State, Message: f.Msg, Hint: f.Hint})
	}
	return connect.NewResponse(res), nil
}
