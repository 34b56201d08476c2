"""A taxi company as seven kinds of services that speak in all five styles: start with contracts.py, then phone.py."""
