// Command shop serves the shop.
package main

import (
	"context"
	"net/http"

	"connectrpc.com/connect"
	cartv1 "example.com/shop/gen/shop/cart/v1"
	"example.com/shop/gen/shop/cart/v1/cartv1connect"
	"example.com/shop/gen/shop/catalog/v1/catalogv1connect"
	"example.com/shop/gen/shop/orders/v1/ordersv1connect"
)

type cart struct {
	cartv1connect.UnimplementedCartServiceHandler
}

func (cart) AddItem(_ context.Context, req *connect.Request[cartv1.AddItemRequest]) (*connect.Response[cartv1.Cart], error) {
	return connect.NewResponse(&cartv1.Cart{User: req.Msg.User, Items: []*cartv1.Item{req.Msg.Item}}), nil
}

func main() {
	mux := http.NewServeMux()
	mux.Handle(cartv1connect.NewCartServiceHandler(cart{}))
	mux.Handle(catalogv1connect.NewCatalogServiceHandler(catalogv1connect.UnimplementedCatalogServiceHandler{}))
	mux.Handle(ordersv1connect.NewOrderServiceHandler(ordersv1connect.UnimplementedOrderServiceHandler{}))
	if err := http.ListenAndServe(":8080", mux); err != nil {
		panic(err)
	}
}
