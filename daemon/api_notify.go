package daemon

import (
	"context"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

type notificationsAPI struct{ d *Daemon }

func wireNotifier(n notifier) *m3ov1.Notifier {
	return &m3ov1.Notifier{Id: n.ID, Url: n.Shown, Format: n.Format, Events: n.Events, User: n.User, Created: stamp(n.Created), Disabled: n.Disabled}
}

func wireDelivery(x delivery) *m3ov1.Delivery {
	return &m3ov1.Delivery{Id: x.Event.ID, Notifier: x.Notifier, Event: x.Event.Type, Status: x.Status, Attempts: int32(x.Attempts), Detail: x.Detail,
		Created: stamp(x.Created), Last: stamp(x.Last), Next: stamp(x.Next), Summary: eventSummary(x.Event)}
}

func (a notificationsAPI) Add(ctx context.Context, req *connect.Request[m3ov1.AddNotifierRequest]) (*connect.Response[m3ov1.AddNotifierResponse], error) {
	n, secret, err := a.d.notify.add(ctx, notifier{App: req.Msg.App, Format: req.Msg.Format, Events: req.Msg.Events, User: who(ctx).User}, m3o.Secret(req.Msg.Url))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.AddNotifierResponse{Notifier: wireNotifier(n), Secret: secret.Reveal()}), nil
}

func (a notificationsAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListNotifiersRequest]) (*connect.Response[m3ov1.ListNotifiersResponse], error) {
	all, err := a.d.notify.list(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListNotifiersResponse{}
	for _, n := range all {
		res.Notifiers = append(res.Notifiers, wireNotifier(n))
	}
	return connect.NewResponse(res), nil
}

func (a notificationsAPI) Remove(ctx context.Context, req *connect.Request[m3ov1.RemoveNotifierRequest]) (*connect.Response[m3ov1.RemoveNotifierResponse], error) {
	if err := a.d.notify.remove(ctx, req.Msg.App, req.Msg.Id); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RemoveNotifierResponse{}), nil
}

func (a notificationsAPI) Test(ctx context.Context, req *connect.Request[m3ov1.TestNotifierRequest]) (*connect.Response[m3ov1.TestNotifierResponse], error) {
	x, err := a.d.notify.test(ctx, req.Msg.App, req.Msg.Id, who(ctx).User)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.TestNotifierResponse{Delivery: wireDelivery(x)}), nil
}

func (a notificationsAPI) History(ctx context.Context, req *connect.Request[m3ov1.NotificationHistoryRequest]) (*connect.Response[m3ov1.NotificationHistoryResponse], error) {
	all, err := a.d.notify.history(ctx, req.Msg.App, req.Msg.Id, limit(req.Msg.Limit))
	if err != nil {
		return nil, err
	}
	res := &m3ov1.NotificationHistoryResponse{}
	for _, x := range all {
		res.Deliveries = append(res.Deliveries, wireDelivery(x))
	}
	return connect.NewResponse(res), nil
}
